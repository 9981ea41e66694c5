"""Answers that people ranked: pairs, or K answers to one prompt."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lit_align.data.base import TextDataModule
from lit_align.data.fit import fit
from lit_align.data.instruction import group_of
from lit_align.data.rows import BadField, Row, Tally
from lit_align.data.store import Item
from lit_align.types import Example, PreferenceBatch, Segment


class PreferenceDataModule(TextDataModule):
    """Batches of ranked answers, for reward models and DPO; see `TextDataModule` for the arguments.

    One example is one prompt with its K answers, and `batch_size` counts prompts. What does not fit has a fate that is
    counted and reported: identical answers to a prompt are merged (their ranks averaged); a prompt whose answers all
    tie, or of which one answer is left, is dropped, as nothing can be learnt from it; an empty answer is kept (the
    model stopped at once).
    """

    def encode(self, row: Row, tally: Tally) -> Sequence[Item]:
        """One item, or none where all answers are equal or tie."""
        if "completions" not in row:
            raise BadField(
                next(iter(row)), "has no ranked answers: expected chosen and rejected, or completions and ranks"
            )
        encoder, prompt = self._encoder(), row["prompt"]
        answers = row["completions"]
        margins = row.get("margins") or [0.0] * len(answers)
        finished = row.get("finished") or [True] * len(answers)
        merged: dict[tuple[str, bool], list[tuple[float, float]]] = {}
        for answer, end, rank, margin in zip(answers, finished, row["ranks"], margins, strict=True):
            merged.setdefault((answer, end), []).append((rank, margin))
        tally["identical_answers"] += len(answers) - len(merged)
        tally["empty_answers"] += sum(not answer.strip() for answer, _ in merged)
        ranks = [sum(rank for rank, _ in given) / len(given) for given in merged.values()]
        margins = [sum(margin for _, margin in given) / len(given) for given in merged.values()]
        if len(merged) < 2 or len(set(ranks)) < 2:
            tally["nothing_to_compare"] += 1
            return []
        tally["ties"] += len(ranks) - len(set(ranks))
        ids = encoder.prompt(prompt)
        branches = [encoder.answer(prompt, answer, end) for answer, end in merged]
        example = Example(Segment(ids, [False] * len(ids)), branches)
        return [Item(fit(example, self.max_length, self.truncate, tally), ranks, margins, group_of(prompt), {})]

    def collate(self, items: Sequence[Item]) -> PreferenceBatch:
        """Packed rows, with the rank and the margin of each answer."""
        return PreferenceBatch(
            self.pack([item.example for item in items]),
            torch.tensor([rank for item in items for rank in item.ranks], dtype=torch.float32),
            torch.tensor([margin for item in items for margin in item.margins], dtype=torch.float32),
        )
