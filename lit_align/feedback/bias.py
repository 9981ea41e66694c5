"""What draws an annotator besides quality: length, the place on the page, a confident tone.

Each is the share of an annotator's decided pairs in which the preferred completion is the longer one, the one shown
first, or the one with fewer hedges. Longer completions may be better, so a share of its own is no bias: beside it
stands how far it lies above the share of the other annotators on the same pairs.
"""

from __future__ import annotations

import itertools
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from lit_align.feedback.labels import Label
from lit_align.feedback.statistics import Interval, clustered

HEDGES = re.compile(
    r"\b(?:maybe|perhaps|possibly|probably|might|could be|i think|i believe|i guess|i am not sure|i'm not sure"
    r"|not certain|it seems|apparently|as far as i know|i do not know|i don't know)\b",
    re.IGNORECASE,
)


def hedges(text: str) -> int:
    """How many phrases of a text express doubt."""
    return len(HEDGES.findall(text))


def _longer(label: Label, i: int, j: int) -> int:
    return len(label.completions[i]) - len(label.completions[j])


def _earlier(label: Label, i: int, j: int) -> int:
    return 0 if label.shown is None else label.shown.index(j) - label.shown.index(i)


def _more_confident(label: Label, i: int, j: int) -> int:
    return hedges(label.completions[j]) - hedges(label.completions[i])


# Above 0 where the first of two completions has more of it than the second, 0 where they do not differ.
TRAITS: dict[str, Callable[[Label, int, int], int]] = {
    "length": _longer,
    "position": _earlier,
    "confidence": _more_confident,
}


class Bias(NamedTuple):
    """How often an annotator prefers the completion with more of a trait.

    Attributes:
        share: of the annotator's decided pairs that differ in the trait.
        above_others: that share on pairs that others decided, too, minus the share of those others; of position the
            share minus one half, as each annotator sees an order of their own.
        pairs: number of the pairs behind `share`.
    """

    share: Interval
    above_others: Interval
    pairs: int


def biases(labels: Sequence[Label], resamples: int = 1000) -> dict[str, dict[str, Bias]]:
    """For each annotator and trait, the bias; intervals resample tasks."""
    by_task: dict[str, list[Label]] = defaultdict(list)
    for label in labels:
        by_task[label.task].append(label)
    names = sorted({label.annotator for label in labels})
    return {name: {trait: _bias(name, trait, by_task, resamples) for trait in TRAITS} for name in names}


def _bias(name: str, trait: str, by_task: dict[str, list[Label]], resamples: int) -> Bias:
    parts = []
    for labels in by_task.values():
        own = next((label for label in labels if label.annotator == name), None)
        if own is None:
            continue
        sums = np.zeros(5)  # hits and pairs; on pairs that others decided, too: hits, pairs, share of the others
        for i, j in itertools.combinations(range(len(own.ranks)), 2):
            hit = _hit(own, i, j, trait)
            if hit is None:
                continue
            sums[:2] += hit, 1
            others = [_hit(label, i, j, trait) for label in labels if label is not own]
            known = [other for other in others if other is not None]
            if known:
                sums[2:5] += hit, 1, sum(known) / len(known)
        parts.append(sums)
    table = np.array(parts).reshape(-1, 5)
    share = clustered(lambda s: s[0] / s[1] if s[1] else np.nan, table, resamples)
    if trait == "position":
        above = Interval(*(value - 0.5 for value in share))
    else:
        above = clustered(lambda s: (s[2] - s[4]) / s[3] if s[3] else np.nan, table, resamples)
    return Bias(share, above, int(table[:, 1].sum()))


def _hit(label: Label, i: int, j: int, trait: str) -> float | None:
    """1 if the preferred of two has more of the trait, 0 if less; None for a tie, or where they do not differ in it."""
    difference, preferred = TRAITS[trait](label, i, j), label.ranks[j] - label.ranks[i]
    return None if not difference or not preferred else float((difference > 0) == (preferred > 0))
