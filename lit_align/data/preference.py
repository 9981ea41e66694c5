"""Answers that people ranked: pairs, or K answers to one prompt."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from statistics import fmean
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lit_align.data.data_module import TextDataModule
from lit_align.data.fit import fit
from lit_align.data.instruction import group_of
from lit_align.data.messages import says_nothing
from lit_align.data.rows import BadField, Row, Tally
from lit_align.data.source import Source
from lit_align.data.store import Item, Store
from lit_align.data.votes import merged_shares
from lit_align.types import Example, PreferenceBatch, Segment


class PreferenceDataModule(TextDataModule):
    """Batches of ranked answers, for reward models and DPO; see `TextDataModule` for the arguments.

    One example is one prompt with its K answers, and `batch_size` counts prompts. What does not fit has a fate that is
    counted and reported: answers to a prompt that are the same tokens, if need be after truncation, are merged (their
    ranks averaged); a prompt whose answers all tie, or of which one answer is left, is dropped, as no comparison
    learns from it; an empty answer is kept (the model stopped at once).

    Args:
        keep_ties: keep prompts whose answers all tie, and single answers with a grade: RewardModule's davidson learns
            from ties, its bradley_terry from people who disagree one to one, its regression from any grade. Single
            answers with a label (prompt, completion, label) are kept for DPOModule's kto without it, and left out and
            counted for a loss that compares answers.
        options: those of `TextDataModule`.
    """

    def __init__(self, tokenizer: str, train: list[Source], keep_ties: bool = False, **options: Any) -> None:
        super().__init__(tokenizer, train, **options)
        self.keep_ties = keep_ties
        self.mismatched = False  # whether batches have that part; DPOModule asks for it, with KTO
        if keep_ties:
            self.encoding = {"keep_ties": True}

    def encode(self, row: Row, tally: Tally) -> Sequence[Item]:
        """One item, or none where all answers are equal or tie."""
        if "ranks" not in row:
            raise BadField(
                next(iter(row)), "has no ranked answers: expected chosen and rejected, or completions and ranks"
            )
        answers, finished = row["completions"], row.get("finished") or [True] * len(row["completions"])
        trunk, branches = self._tokens(row, answers, finished, tally)
        merged: dict[tuple[int, ...], list[int]] = {}  # tokens of an answer: which of the answers they are
        for k, branch in enumerate(branches):
            merged.setdefault(tuple(branch.tokens), []).append(k)
        groups = list(merged.values())
        tally["identical_answers"] += len(answers) - len(groups)
        tally["empty_answers"] += sum(says_nothing(answers[same[0]]) for same in groups)

        def mean(values: Sequence[float]) -> list[float]:
            return [fmean(values[k] for k in same) for same in groups]

        ranks, grades = mean(row["ranks"]), mean(row["scores"]) if row.get("scores") else []
        if "label" in row:
            tally["judged_one_by_one"] += 1
        elif len(set(ranks)) < 2 and not (self.keep_ties and (len(ranks) > 1 or grades)):
            tally["nothing_to_compare"] += 1
            return []
        tally["ties"] += len(ranks) - len(set(ranks))
        margins = mean(row.get("margins") or [0.0] * len(answers))
        shares = merged_shares(row["shares"], groups) if row.get("shares") else []
        example = Example(trunk, [branches[same[0]] for same in groups])
        return [Item(example, ranks, margins, group_of(row["prompt"]), {}, shares, grades)]

    def usable(self, store: Store, name: str) -> np.ndarray | None:
        """Which items the module learns from; None for all. A loss that compares answers takes no single ones.

        Raises:
            ValueError: there are only single answers.
        """
        module = self.consumer
        if self.keep_ties or module is None or getattr(module, "single_answers", False) or not len(store):
            return None
        compares = store.num_answers() > 1
        if alone := int((~compares).sum()):
            loss = getattr(module, "loss_name", None)
            what = f"{type(module).__name__}{f' with loss: {loss}' if loss else ''} compares answers to one prompt"
            said = f"{name}: {alone:,} of {len(store):,} examples are one answer with a label"
            if alone == len(store):
                raise ValueError(f"{said}, and {what}: set DPOModule's loss: kto, or give pairs (chosen, rejected)")
            rank_zero_info(f"{said}, and are left out: {what} (DPOModule's loss: kto learns from them)")
        return compares

    def _tokens(self, row: Row, answers: list[Any], finished: list[bool], tally: Tally) -> Example:
        encoder, prompt, tools = self._encoder(), row["prompt"], row.get("tools")
        ids = encoder.prompt(prompt, tools)
        self._write_down(prompt, tally)
        branches = [encoder.answer(prompt, answer, end, tools) for answer, end in zip(answers, finished, strict=True)]
        return fit(Example(Segment(ids, [False] * len(ids)), branches), self.max_length, self.truncate, tally, self.bos)

    def training_item(self, number: int) -> Item:
        """An example by its place in the order; where asked for, beside it its prompt with answers to another.

        They are those of the next example that has another prompt, so that what is compared does not depend on batches,
        micro-batches and processes. They come on top of `micro_batch_tokens`, as they need no backward.

        Raises:
            ValueError: there is one prompt in all.
        """
        item = super().training_item(number)
        if not self.mismatched:
            return item
        following = map(super().training_item, range(number + 1, number + 1 + len(self._training_order())))
        other = next((other for other in following if other.group != item.group), None)
        if other is None:
            raise ValueError("KTO compares prompts with each other's answers, and the training data has one prompt")
        pair = Example(item.example.trunk, other.example.branches)
        return item._replace(mismatched=fit(pair, self.max_length, "prompt", Tally(), self.bos))

    def collate(self, items: Sequence[Item]) -> PreferenceBatch:
        """Packed rows, with the rank and the margin of each answer, and what else items have."""
        shares = [item.shares or [math.nan] * math.comb(len(item.ranks), 2) for item in items]
        grades = [item.grades or [math.nan] * len(item.ranks) for item in items]
        mismatched = [item.mismatched for item in items if item.mismatched is not None]
        return PreferenceBatch(
            self.pack([item.example for item in items]),
            _flat([item.ranks for item in items]),
            _flat([item.margins for item in items]),
            torch.tensor([_key(item.example) for item in items]),
            _flat(shares) if any(item.shares for item in items) else None,
            _flat(grades) if any(item.grades for item in items) else None,
            self.pack(mismatched) if mismatched else None,
        )


def _flat(values: Sequence[Sequence[float]]) -> Tensor:
    return torch.tensor([value for of_item in values for value in of_item], dtype=torch.float32)


def _key(example: Example) -> int:
    """A hash of the tokens of an example that fits an int64."""
    tokens = [list(example.trunk.tokens), *(list(branch.tokens) for branch in example.branches)]
    return int.from_bytes(hashlib.blake2b(json.dumps(tokens).encode(), digest_size=8).digest(), "big", signed=True)
