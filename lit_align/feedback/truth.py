"""What annotators come to: Dawid and Skene's model of their errors, and Plackett and Luce's of strengths."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


class DawidSkene(NamedTuple):
    """Result of `dawid_skene`.

    Attributes:
        posterior_UC: probability of each class for each unit.
        confusion_ACC: probability that an annotator says class k of a unit whose class is c.
        prior_C: share of each class.
        log_likelihood: of all ratings, in nats, at the parameters that gave the posterior.
        iterations: of EM.
    """

    posterior_UC: Floats
    confusion_ACC: Floats
    prior_C: Floats
    log_likelihood: float
    iterations: int

    def accuracy(self) -> Floats:
        """Probability that an annotator says the true class. Shape (A,)."""
        return np.einsum("acc,c->a", self.confusion_ACC, self.prior_C)


def dawid_skene(
    unit_R: Ints,
    annotator_R: Ints,
    class_R: Ints,
    classes: int,
    iterations: int = 100,
    tolerance: float = 1e-8,
    smoothing: float = 0.0,
    mirror: Sequence[int] | None = None,
) -> DawidSkene:
    """Estimate true classes and each annotator's errors by expectation maximisation, beginning with the vote.

    Args:
        unit_R: unit of each rating, from 0. Shape (R,).
        annotator_R: annotator of each rating, from 0.
        class_R: class that it names, from 0.
        classes: number of classes.
        iterations: at most so many.
        tolerance: stop when no posterior changes by more.
        smoothing: ratings added to each cell of each annotator's table: one with few ratings is not taken for perfect.
        mirror: for each class, the class that it becomes where the two sides of a unit are swapped. Which completion is
            the first is arbitrary, so an annotator's errors are the same either way: half as many parameters.

    Raises:
        ValueError: no ratings.

    Source: Dawid and Skene 1979, "Maximum likelihood estimation of observer error-rates using the EM algorithm",
        equations 2.3 to 2.5.
    """
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1, got {iterations}")
    if not len(unit_R):
        raise ValueError("dawid_skene needs at least one rating")
    units, annotators = int(unit_R.max()) + 1, int(annotator_R.max()) + 1
    posterior_UC = np.zeros((units, classes))
    np.add.at(posterior_UC, (unit_R, class_R), 1.0)
    posterior_UC /= posterior_UC.sum(1, keepdims=True)
    for done in range(1, iterations + 1):  # noqa: B007
        table_ACC = np.zeros((annotators, classes, classes))  # annotator, true class, said class
        np.add.at(table_ACC.transpose(0, 2, 1), (annotator_R, class_R), posterior_UC[unit_R])
        prior_C = posterior_UC.mean(0)
        if mirror is not None:
            swapped = np.asarray(mirror)
            table_ACC = (table_ACC + table_ACC[:, swapped][:, :, swapped]) / 2
            prior_C = (prior_C + prior_C[swapped]) / 2
        table_ACC = np.maximum(table_ACC + smoothing, 1e-10)  # the logarithm below needs more than 0
        confusion_ACC = table_ACC / table_ACC.sum(2, keepdims=True)
        log_UC = np.tile(np.log(np.maximum(prior_C, 1e-10)), (units, 1))
        np.add.at(log_UC, unit_R, np.log(confusion_ACC[annotator_R, :, class_R]))
        highest_U = log_UC.max(1, keepdims=True)
        total_U = highest_U + np.log(np.exp(log_UC - highest_U).sum(1, keepdims=True))
        before_UC, posterior_UC = posterior_UC, np.exp(log_UC - total_U)
        if np.abs(posterior_UC - before_UC).max() < tolerance:
            break
    return DawidSkene(posterior_UC, confusion_ACC, prior_C, float(total_U.sum()), done)


def log_odds_weights(accuracy_A: Floats, classes: int = 2, most: float = 0.99) -> Floats:
    """Weights of the best weighted vote for annotators of these accuracies; 0 for one no better than chance.

    Source: Nitzan and Paroush 1982, "Optimal decision rules in uncertain dichotomous choice situations"; with more
        classes, log(accuracy (classes - 1) / (1 - accuracy)).
    """
    bounded_A = np.clip(accuracy_A, 1 / classes, most)
    return np.log(bounded_A * (classes - 1) / (1 - bounded_A))


def plackett_luce(
    rankings: Sequence[Sequence[int]], items: int, iterations: int = 10_000, tolerance: float = 1e-10
) -> Floats:
    """Log-strengths of items out of rankings, best first, each of some of the items; their mean is 0.

    Args:
        rankings: item numbers, best first.
        items: number of items.
        iterations: at most so many.
        tolerance: stop when no log-strength changes by more.

    Raises:
        ValueError: an item that nobody ranked above another, or below: its strength has no maximum.

    Source: Hunter 2004, "MM algorithms for generalized Bradley-Terry models", equation 30.
    """
    if not items:
        return np.zeros(0)
    wins_I, losses_I = np.zeros(items), np.zeros(items)
    for ranking in rankings:
        for place, item in enumerate(ranking):
            wins_I[item] += place < len(ranking) - 1
            losses_I[item] += place > 0
    if not (wins_I.all() and losses_I.all()):
        alone = int(np.flatnonzero((wins_I == 0) | (losses_I == 0))[0])
        raise ValueError(f"item {alone} always comes first, always last or never: its strength has no maximum")
    strength_I = np.ones(items)
    for _ in range(iterations):
        below_I = np.zeros(items)
        for ranking in rankings:
            held = strength_I[list(ranking)]
            # Of each stage but the last: 1 over the strengths that are left.
            inverse = 1 / np.cumsum(held[::-1])[::-1][:-1]
            shares = np.cumsum(inverse)
            below_I[list(ranking)] += np.append(shares, shares[-1])
        before, strength_I = strength_I, wins_I / below_I
        strength_I /= np.exp(np.log(strength_I).mean())
        if np.abs(np.log(strength_I) - np.log(before)).max() < tolerance:
            break
    return np.log(strength_I)
