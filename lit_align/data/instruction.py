"""Demonstrations to imitate: conversations, prompts with an answer, plain text."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any, Literal

from lit_align.data.data_module import TextDataModule
from lit_align.data.fit import chunk, fit
from lit_align.data.rows import BadField, Row, Tally, user
from lit_align.data.source import Source
from lit_align.data.store import Item
from lit_align.types import Example, PackedBatch, Segment


def group_of(prompt: Any) -> str:
    """A hash of a prompt, a text being the user's turn that it becomes: what the validation split keeps together."""
    turns = user(prompt) if isinstance(prompt, str) else prompt
    prompt = [{name: value for name, value in turn.items() if name != "train"} for turn in turns]
    return hashlib.sha256(json.dumps(prompt, sort_keys=True).encode()).hexdigest()[:16]


class InstructionDataModule(TextDataModule):
    """Packed batches of demonstrations, for SFT; see `TextDataModule` for the arguments.

    Conversations and prompts with an answer are scored on what the assistant says, the stop token included; plain text
    is scored everywhere, and cut into pieces of `max_length`, none of it dropped.

    Args:
        loss_on: of demonstrations, score the response, or all: the prompt and the template's own words too, every token
            but the first.
        options: those of `TextDataModule`.
    """

    def __init__(
        self, tokenizer: str, train: list[Source], loss_on: Literal["response", "all"] = "response", **options: Any
    ) -> None:
        super().__init__(tokenizer, train, **options)
        if loss_on == "all" and self.turns == "last":
            raise ValueError("loss_on: all scores every token of a conversation: it leaves nothing for turns: last")
        self.loss_on = loss_on
        if loss_on != "response":
            self.encoding = {"loss_on": loss_on}

    def encode(self, row: Row, tally: Tally) -> Sequence[Item]:
        """One item for a conversation, one or more for a text."""
        if "text" in row:
            document = _with_something_scored(self._encoder().text(row["text"]), "text")
            tally.write_down("text")
            pieces = chunk(document, self.max_length)
            return [Item(Example(piece), [], [], group_of(row["text"]), {}) for piece in pieces]
        tools = row.get("tools")
        if "label" in row:
            if not row["label"]:
                tally["answers_labelled_false"] += 1  # nothing to imitate
                return []
            row = {"prompt": row["prompt"], "completion": row["completions"][0]}
        if "messages" in row:
            field, messages = "messages", row["messages"]
            speaks = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
            prompt = messages[: speaks[-1]]
            if not self._encoder().scored_turns(messages):
                tally["rows_with_nothing_to_train_on"] += 1  # each turn of the assistant has train: false
                return []
            sequences = self._encoder().conversations(messages, tools)
            if len(sequences) > 1:
                tally["turns_as_examples_of_their_own"] += len(sequences)
        elif "completion" in row:
            field, prompt = "completion", row["prompt"]
            ids = self._encoder().prompt(prompt, tools)
            answer = self._encoder().answer(prompt, row["completion"], tools=tools)
            sequences = [Segment([*ids, *answer.tokens], [False] * len(ids) + list(answer.scored))]
        else:
            raise BadField(
                next(iter(row)), "belongs to rankings or bare prompts, which hold no demonstration to imitate"
            )
        self._write_down(prompt, tally)
        return [self._item(sequence, field, prompt, tally) for sequence in sequences]

    def _item(self, sequence: Segment, field: str, prompt: Any, tally: Tally) -> Item:
        example = fit(Example(_with_something_scored(sequence, field)), self.max_length, self.truncate, tally, self.bos)
        if self.loss_on == "all":
            tokens = example.trunk.tokens
            example = Example(Segment(tokens, [False] + [True] * (len(tokens) - 1)))
        return Item(example, [], [], group_of(prompt), {})

    def collate(self, items: Sequence[Item]) -> PackedBatch:
        """Packed rows."""
        return self.pack([item.example for item in items])


def _with_something_scored(sequence: Segment, field: str) -> Segment:
    if not any(sequence.scored):
        raise BadField(field, "comes out as a single token, which nothing comes before to predict it from")
    return sequence
