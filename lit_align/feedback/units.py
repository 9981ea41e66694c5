"""Labels as tables of ratings: a unit is two completions of a task, or one completion under one criterion."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lit_align.feedback.labels import Label
from lit_align.feedback.statistics import Floats


@dataclass(frozen=True)
class Ratings:
    """Ratings of units by annotators.

    Attributes:
        ratings_UA: of a pair, above 0 where the first completion is better, 0 for a tie, and as far from 0 as the
            annotator says it is better (1 where nobody asked); of a criterion, the score. NaN where missing.
        units: task, and the numbers of its completions.
        annotators: names of the columns, sorted.
        cluster_U: task of each unit, numbered from 0.
        category_U: category of each unit's prompt; empty text where there is none.
    """

    ratings_UA: Floats
    units: list[tuple[str, int, int]]
    annotators: list[str]
    cluster_U: NDArray[np.int64]
    category_U: NDArray[np.str_]

    def signs(self) -> Floats:
        """Of pairs: -1, 0 or 1 for second, tie and first."""
        return np.sign(self.ratings_UA)

    def of(self, chosen_U: NDArray[np.bool_]) -> Ratings:
        """Some of the units."""
        _, clusters = np.unique(self.cluster_U[chosen_U], return_inverse=True)
        units = [unit for unit, kept in zip(self.units, chosen_U, strict=True) if kept]
        return Ratings(self.ratings_UA[chosen_U], units, self.annotators, clusters, self.category_U[chosen_U])


def one_per_annotator(labels: Sequence[Label]) -> tuple[list[Label], int]:
    """The last label of each annotator of each task, and how many earlier ones were left out.

    Raises:
        ValueError: two labels call different completions by one task's name.
    """
    kept: dict[tuple[str, str], Label] = {}
    texts: dict[str, tuple[str, ...]] = {}
    for label in labels:
        if texts.setdefault(label.task, label.completions) != label.completions:
            raise ValueError(f"task {label.task!r}: labels of it have different completions; name tasks apart")
        kept[label.task, label.annotator] = label
    return list(kept.values()), len(labels) - len(kept)


def pair_ratings(labels: Sequence[Label]) -> Ratings:
    """Each two completions of each task, rated by each annotator; see `Ratings`."""
    cells = {}
    for label in labels:
        for i, j in itertools.combinations(range(len(label.ranks)), 2):
            sign = float(np.sign(label.ranks[j] - label.ranks[i]))
            strong = label.strength if label.strength is not None and len(label.ranks) == 2 else 1
            cells[(label.task, i, j), label.annotator] = sign * strong
    return _table(cells, {label.task: label.category or "" for label in labels})


def criterion_ratings(labels: Sequence[Label], criterion: str) -> Ratings:
    """Each completion of each task under one criterion; the last number of a unit is that of the first."""
    cells = {
        ((label.task, k, k), label.annotator): score
        for label in labels
        for k, score in enumerate(label.criteria.get(criterion, ()))
    }
    return _table(cells, {label.task: label.category or "" for label in labels})


def _table(cells: dict[tuple[tuple[str, int, int], str], float], category: dict[str, str]) -> Ratings:
    units = list(dict.fromkeys(unit for unit, _ in cells))
    annotators = sorted({annotator for _, annotator in cells})
    row, column = {u: n for n, u in enumerate(units)}, {a: n for n, a in enumerate(annotators)}
    tasks = {task: n for n, task in enumerate(dict.fromkeys(task for task, _, _ in units))}
    ratings = np.full((len(units), len(annotators)), np.nan)
    for (unit, annotator), rating in cells.items():
        ratings[row[unit], column[annotator]] = rating
    return Ratings(
        ratings,
        units,
        annotators,
        np.array([tasks[task] for task, _, _ in units], dtype=np.int64),
        np.array([category[task] for task, _, _ in units], dtype=np.str_),
    )
