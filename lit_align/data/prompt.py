"""Prompts to answer, and optionally text to mix into PPO's updates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from lit_align.data.data_module import TextDataModule
from lit_align.data.fit import fit
from lit_align.data.instruction import InstructionDataModule, group_of
from lit_align.data.rows import JUDGEMENTS, BadField, Row, Tally
from lit_align.data.source import Source
from lit_align.data.store import Item
from lit_align.types import Example, PromptBatch, Segment


class PromptDataModule(TextDataModule):
    """Batches of prompts, for PPO and for sampling; see `TextDataModule` for the arguments.

    Demonstrations and rankings serve too: their prompt is taken, and a demonstration's answer is kept as `reference`.
    Here `max_length` bounds the prompt alone.

    Args:
        ptx: text to mix into each PPO update (PPO-ptx), with a batch size of its own.
        options: those of `TextDataModule`.
    """

    def __init__(
        self, tokenizer: str, train: list[Source], ptx: InstructionDataModule | None = None, **options: Any
    ) -> None:
        super().__init__(tokenizer, train, **options)
        if self.micro_batch_tokens is not None or (ptx is not None and ptx.micro_batch_tokens is not None):
            raise ValueError(
                "data.micro_batch_tokens is not for prompts: micro-batches are made of answers, which are sampled "
                "later; set model.micro_batch_size or model.micro_batch_tokens"
            )
        self.ptx = ptx

    answered = True

    def longest_sequences(self) -> list[tuple[str, int, bool]]:
        """Of the prompts, and of the text."""
        return [*super().longest_sequences(), *(self.ptx.longest_sequences() if self.ptx is not None else [])]

    def largest_tokens(self) -> list[tuple[str, int]]:
        """Of the prompts, and of the text."""
        return [*super().largest_tokens(), *(self.ptx.largest_tokens() if self.ptx is not None else [])]

    def encode(self, row: Row, tally: Tally) -> Sequence[Item]:
        """One item, its row kept for the reward."""
        if "messages" in row:
            *prompt, last = row["messages"]
            if last["role"] != "assistant" or not prompt:
                raise BadField("messages", "must end with an assistant turn after a prompt")
            row = {**_tools(row), "prompt": prompt, "reference": last["content"] or last}
        elif "completion" in row:
            row = {**_tools(row), "prompt": row["prompt"], "reference": row["completion"]}
        elif "prompt" not in row:
            raise BadField(next(iter(row)), "has no prompt")
        if "completions" in row:
            row = {name: value for name, value in row.items() if name not in JUDGEMENTS}
        ids = self._encoder().prompt(row["prompt"], row.get("tools"))
        self._write_down(row["prompt"], tally)
        example = fit(Example(Segment(ids, [False] * len(ids))), self.max_length, self.truncate, tally, self.bos)
        return [Item(example, [], [], group_of(row["prompt"]), row)]

    def collate(self, items: Sequence[Item]) -> PromptBatch:
        """Prompts as they are: how they are laid out depends on what is sampled."""
        return PromptBatch([torch.tensor(item.example.trunk.tokens) for item in items], [item.row for item in items])

    # The text of PPO-ptx follows the prompts' position: batch n of the one goes with batch n of the other.

    def prepare_data(self) -> None:
        """Tokenise the prompts, and the text."""
        super().prepare_data()
        if self.ptx is not None:
            self.ptx.prepare_data()

    def setup(self, stage: str) -> None:
        """Read the prompts, and the text."""
        super().setup(stage)
        if self.ptx is not None and stage == "fit":
            self.ptx.trainer = self.trainer
            self.ptx.batches_per_epoch = len(self.train_dataloader())
            self.ptx.setup(stage)
            self.ptx._training_order()  # none is an error now, not in the middle of the first epoch

    def state_dict(self) -> dict[str, Any]:
        """Of the prompts, and of the text."""
        return super().state_dict() | ({"ptx": self.ptx.state_dict()} if self.ptx is not None else {})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there; refuse phases that have moved, of the prompts or of the text."""
        super().load_state_dict(state_dict)
        if self.ptx is not None:
            self.ptx.load_state_dict(state_dict.get("ptx", {"batches": 0}))

    def _train_batch(self, number: int) -> PromptBatch:
        batch: PromptBatch = super()._train_batch(number)
        return batch if self.ptx is None else batch._replace(ptx=self.ptx._train_batch(number))


def _tools(row: Row) -> Row:
    return {"tools": row["tools"]} if "tools" in row else {}
