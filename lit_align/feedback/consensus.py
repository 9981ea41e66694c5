"""Labels of several annotators into one soft label a pair: `shares`, which `RewardModule` learns from."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from lit_align.feedback.labels import Label, Row
from lit_align.feedback.truth import DawidSkene, dawid_skene, log_odds_weights
from lit_align.feedback.units import Ratings, pair_ratings

Method = Literal["dawid-skene", "weighted", "majority"]
FIRST, SECOND, TIE = 0, 1, 2
# Ratings added to each cell of an annotator's table: half a rating, as Jeffreys' prior adds.
SMOOTHING = 0.5


class Consensus(NamedTuple):
    """Soft labels, and what was learnt of each annotator.

    Attributes:
        share_U: probability that the first completion of each pair is the better one; a tie counts half.
        model: Dawid and Skene's; see `dawid_skene`. Classes are first, second and, if anybody called one, tie.
        accuracy: of each annotator by that model.
        weight: of each annotator in a weighted vote; see `log_odds_weights`.
    """

    share_U: np.ndarray
    model: DawidSkene
    accuracy: dict[str, float]
    weight: dict[str, float]


def consensus(ratings: Ratings, method: Method = "dawid-skene") -> Consensus:
    """What annotators come to.

    Args:
        ratings: of pairs.
        method: dawid-skene for the posterior of Dawid and Skene's model, whose errors of an annotator do not depend on
            which completion is called the first; weighted for a vote by log-odds of its accuracies; majority for the
            share of annotators.
    """
    sign_UA = ratings.signs()
    unit_R, annotator_R = np.nonzero(~np.isnan(sign_UA))
    sign_R = sign_UA[unit_R, annotator_R]
    class_R = np.select([sign_R > 0, sign_R < 0], [FIRST, SECOND], TIE)
    classes = 3 if (class_R == TIE).any() else 2
    mirror = [SECOND, FIRST, TIE][:classes]
    model = dawid_skene(unit_R, annotator_R, class_R, classes, smoothing=SMOOTHING, mirror=mirror)
    accuracy_A, worth_C = model.accuracy(), np.array([1.0, 0.0, 0.5])[:classes]
    weight_A = log_odds_weights(accuracy_A, classes)
    if method == "dawid-skene":
        share_U = model.posterior_UC @ worth_C
    else:
        vote_R = weight_A[annotator_R] if method == "weighted" else np.ones(len(unit_R))
        votes_U, all_U = np.zeros(len(ratings.units)), np.zeros(len(ratings.units))
        # Where every weight is 0, nobody is better than chance, and the pair is open.
        np.add.at(votes_U, unit_R, vote_R * worth_C[class_R])
        np.add.at(all_U, unit_R, vote_R)
        share_U = np.where(all_U > 0, votes_U / np.where(all_U > 0, all_U, 1), 0.5)
    accuracy = dict(zip(ratings.annotators, map(float, accuracy_A), strict=True))
    return Consensus(share_U, model, accuracy, dict(zip(ratings.annotators, map(float, weight_A), strict=True)))


def soft_rows(labels: Sequence[Label], method: Method = "dawid-skene") -> list[Row]:
    """A row for each task: prompt, completions and `shares`, as `PreferenceDataModule` reads them.

    Args:
        labels: one of each annotator of each task; controls are left out.
        method: see `consensus`.

    Raises:
        ValueError: there are only controls.
    """
    counted = [label for label in labels if not label.control]
    if not counted:
        raise ValueError("no labels but those of controls: nothing to train on")
    ratings = pair_ratings(counted)
    shares = dict(zip(ratings.units, consensus(ratings, method).share_U, strict=True))
    by_task: dict[str, list[Label]] = defaultdict(list)
    for label in counted:
        by_task[label.task].append(label)
    return [_row(task, of_task, shares, method) for task, of_task in by_task.items()]


def _row(task: str, labels: list[Label], shares: dict[tuple[str, int, int], Any], method: Method) -> Row:
    first = labels[0]
    pairs = itertools.combinations(range(len(first.completions)), 2)
    row: Row = {"prompt": first.prompt, "completions": list(first.completions)}
    row["shares"] = [round(float(shares[task, i, j]), 6) for i, j in pairs]
    row |= {"task": task, "annotators": len(labels), "method": method}
    for name, value in (("category", first.category), ("tools", first.tools)):
        if value is not None:
            row[name] = value
    if first.finished is not None:
        row["finished"] = list(first.finished)
    return row
