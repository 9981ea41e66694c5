"""Answers that people ranked: pairs, or K answers to one prompt."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from statistics import fmean

import torch

from lit_align.data.base import TextDataModule
from lit_align.data.chat import Messages
from lit_align.data.fit import fit
from lit_align.data.instruction import group_of
from lit_align.data.rows import BadField, Row, Tally
from lit_align.data.store import Item
from lit_align.types import Example, PreferenceBatch, Segment


class PreferenceDataModule(TextDataModule):
    """Batches of ranked answers, for reward models and DPO; see `TextDataModule` for the arguments.

    One example is one prompt with its K answers, and `batch_size` counts prompts. What does not fit has a fate that is
    counted and reported: answers to a prompt that are the same tokens, if need be after truncation, are merged (their
    ranks averaged); a prompt whose answers all tie, or of which one answer is left, is dropped, as nothing can be
    learnt from it; an empty answer is kept (the model stopped at once).
    """

    def encode(self, row: Row, tally: Tally) -> Sequence[Item]:
        """One item, or none where all answers are equal or tie."""
        if "completions" not in row:
            raise BadField(
                next(iter(row)), "has no ranked answers: expected chosen and rejected, or completions and ranks"
            )
        answers, finished = row["completions"], row.get("finished") or [True] * len(row["completions"])
        trunk, branches = self._tokens(row["prompt"], answers, finished, tally)
        merged: dict[tuple[int, ...], list[int]] = {}  # tokens of an answer: which of the answers they are
        for k, branch in enumerate(branches):
            merged.setdefault(tuple(branch.tokens), []).append(k)
        tally["identical_answers"] += len(answers) - len(merged)
        tally["empty_answers"] += sum(not answers[same[0]].strip() for same in merged.values())
        ranks = [fmean(row["ranks"][k] for k in same) for same in merged.values()]
        if len(set(ranks)) < 2:
            tally["nothing_to_compare"] += 1
            return []
        tally["ties"] += len(ranks) - len(set(ranks))
        margins = row.get("margins") or [0.0] * len(answers)
        margins = [fmean(margins[k] for k in same) for same in merged.values()]
        example = Example(trunk, [branches[same[0]] for same in merged.values()])
        return [Item(example, ranks, margins, group_of(row["prompt"]), {})]

    def _tokens(self, prompt: str | Messages, answers: list[str], finished: list[bool], tally: Tally) -> Example:
        encoder = self._encoder()
        ids = encoder.prompt(prompt)
        branches = [encoder.answer(prompt, answer, end) for answer, end in zip(answers, finished, strict=True)]
        return fit(Example(Segment(ids, [False] * len(ids)), branches), self.max_length, self.truncate, tally, self.bos)

    def collate(self, items: Sequence[Item]) -> PreferenceBatch:
        """Packed rows, with the rank and the margin of each answer."""
        return PreferenceBatch(
            self.pack([item.example for item in items]),
            torch.tensor([rank for item in items for rank in item.ranks], dtype=torch.float32),
            torch.tensor([margin for item in items for margin in item.margins], dtype=torch.float32),
            torch.tensor([_key(item.example) for item in items]),
        )


def _key(example: Example) -> int:
    """A hash of the tokens of an example that fits an int64."""
    tokens = [list(example.trunk.tokens), *(list(branch.tokens) for branch in example.branches)]
    return int.from_bytes(hashlib.blake2b(json.dumps(tokens).encode(), digest_size=8).digest(), "big", signed=True)
