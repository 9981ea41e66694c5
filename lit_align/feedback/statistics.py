"""Agreement of annotators, with intervals: pairwise, Cohen's and Fleiss' kappa, Krippendorff's alpha.

Everything is a function of sums over clusters (tasks): the pairs of one ranking are not independent, so intervals come
from resampling tasks and not pairs. Arrays here are numpy; a table of ratings has a unit in each row, an annotator in
each column, and NaN where an annotator gave no rating.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Level = Literal["nominal", "ordinal", "interval"]


class Interval(NamedTuple):
    """A value with its 95 % interval; NaN where it is not defined."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        if np.isnan(self.value):
            return "not defined"
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def clustered(statistic: Callable[[Floats], float], parts_EV: Floats, resamples: int = 1000, seed: int = 0) -> Interval:
    """A statistic of sums over clusters, with a percentile bootstrap interval that resamples clusters.

    Args:
        statistic: takes the sums, shape (V,); NaN where they leave it undefined.
        parts_EV: what each cluster adds to the sums. Shape (E, V).
        resamples: 0 for no interval.
        seed: of the resampling.

    Returns:
        The statistic, and its 2.5 % and 97.5 % quantiles over resamples in which it is defined; NaN ends with fewer
        than two clusters.

    Source: Efron and Tibshirani 1993, "An Introduction to the Bootstrap", section 13.3.
    """
    value = float(statistic(parts_EV.sum(0)))
    clusters = len(parts_EV)
    if clusters < 2 or resamples < 1 or np.isnan(value):
        return Interval(value, np.nan, np.nan)
    rng = np.random.default_rng(seed)
    draws = []
    for begin in range(0, resamples, 100):  # in parts, so that many clusters need no table of all draws
        times_BE = rng.multinomial(clusters, np.full(clusters, 1 / clusters), size=min(100, resamples - begin))
        draws += [float(statistic(sums_V)) for sums_V in times_BE @ parts_EV]
    known = [draw for draw in draws if not np.isnan(draw)]
    if not known:
        return Interval(value, np.nan, np.nan)
    low, high = np.quantile(known, [0.025, 0.975])
    return Interval(value, float(low), float(high))


def by_cluster(parts_UV: Floats, cluster_U: NDArray[np.int64]) -> Floats:
    """Sums of the units of each cluster; clusters are numbered from 0. Shape (E, V)."""
    sums = np.zeros((int(cluster_U.max()) + 1 if len(cluster_U) else 0, parts_UV.shape[1]))
    np.add.at(sums, cluster_U, parts_UV)
    return sums


def counts_of(ratings_UA: Floats, values: Floats) -> Floats:
    """How many annotators gave each value to each unit. Shape (U, C)."""
    return (ratings_UA[:, :, None] == values).sum(1).astype(float)


def values_in(ratings_UA: Floats) -> Floats:
    """The values that occur, ascending."""
    return np.unique(ratings_UA[~np.isnan(ratings_UA)])


def pairwise_agreement(ratings_UA: Floats, cluster_U: NDArray[np.int64], resamples: int = 1000) -> Interval:
    """Share of two annotators' ratings of the same unit that are equal, over all such twos.

    Source: Ouyang et al. 2022, InstructGPT, section 3.4 (inter-annotator agreement).
    """
    counts_UC = counts_of(ratings_UA, values_in(ratings_UA))
    raters_U = counts_UC.sum(1)
    agreeing_U, twos_U = (counts_UC * (counts_UC - 1)).sum(1), raters_U * (raters_U - 1)
    parts = by_cluster(np.stack([agreeing_U, twos_U], 1), cluster_U)
    return clustered(lambda sums: _ratio(sums[0], sums[1]), parts, resamples)


def distances(values: Floats, totals_C: Floats, level: Level) -> Floats:
    """Squared differences between values, by level of measurement. Shape (C, C).

    Args:
        values: ascending.
        totals_C: how often each value occurs among pairable ratings; of the ordinal level alone.
        level: nominal: 0 or 1; ordinal: by how many ratings lie between; interval: of the numbers.

    Source: Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability", section on metric differences.
    """
    if level == "nominal":
        return 1.0 - np.eye(len(values))
    if level == "interval":
        return np.square(values[:, None] - values[None, :])
    # The ratings from value c to value k, those of the two ends by half.
    middle_C = np.cumsum(totals_C) - totals_C / 2
    return np.square(middle_C[:, None] - middle_C[None, :])


def krippendorff_alpha(
    ratings_UA: Floats, level: Level = "nominal", cluster_U: NDArray[np.int64] | None = None, resamples: int = 1000
) -> Interval:
    """Krippendorff's alpha = 1 - observed / expected disagreement; missing ratings are allowed.

    Args:
        ratings_UA: NaN where a rating is missing; units with fewer than two ratings do not count. Shape (U, A).
        level: of measurement.
        cluster_U: cluster of each unit, for the interval; null for each its own.
        resamples: of the bootstrap over clusters; the expected disagreement is that of each resample.

    Returns:
        NaN where all ratings are the same: there is nothing to agree on.

    Source: Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability" (coincidence matrices).
    """
    values = values_in(ratings_UA)
    counts_UC = counts_of(ratings_UA, values)
    raters_U = counts_UC.sum(1)
    counts_UC, raters_U = counts_UC * (raters_U >= 2)[:, None], np.maximum(raters_U, 2)
    # Coincidences of a unit: o_ck = n_c (n_k - [c = k]) / (m - 1).
    both_UCC = counts_UC[:, :, None] * counts_UC[:, None, :]
    index = np.arange(len(values))
    both_UCC[:, index, index] -= counts_UC
    both_UCC /= (raters_U - 1)[:, None, None]
    cluster_U = np.arange(len(ratings_UA)) if cluster_U is None else cluster_U

    def alpha(sums: Floats) -> float:
        seen_CC = sums.reshape(len(values), len(values))
        totals_C = seen_CC.sum(1)
        far_CC = distances(values, totals_C, level)
        expected = (np.outer(totals_C, totals_C) * far_CC).sum() / max(totals_C.sum() - 1, 1)
        return 1.0 - _ratio((seen_CC * far_CC).sum(), expected)

    return clustered(alpha, by_cluster(both_UCC.reshape(len(ratings_UA), -1), cluster_U), resamples)


def cohen_kappa(
    first_U: Floats,
    second_U: Floats,
    weights: Literal["none", "linear", "quadratic"] = "none",
    cluster_U: NDArray[np.int64] | None = None,
    resamples: int = 1000,
) -> Interval:
    """Cohen's kappa of two annotators over the units that both rated; NaN where both gave one value throughout.

    Args:
        first_U: ratings of one, NaN where missing. Shape (U,).
        second_U: those of the other.
        weights: how far apart two values are: none (0 or 1), or by their rank among all values that occur.
        cluster_U: as for `krippendorff_alpha`.
        resamples: as for `krippendorff_alpha`.

    Source: Cohen 1960; Cohen 1968 with weights.
    """
    cluster_U = np.arange(len(first_U)) if cluster_U is None else cluster_U
    rated = ~np.isnan(first_U) & ~np.isnan(second_U)
    first_U, second_U, cluster_U = first_U[rated], second_U[rated], cluster_U[rated]
    values = values_in(np.stack([first_U, second_U]))
    parts = np.zeros((len(first_U), len(values), len(values)))
    parts[np.arange(len(first_U)), np.searchsorted(values, first_U), np.searchsorted(values, second_U)] = 1.0
    far = np.abs(np.subtract.outer(np.arange(len(values)), np.arange(len(values)))).astype(float)
    far = {"none": (far > 0).astype(float), "linear": far, "quadratic": far**2}[weights]

    def kappa(sums: Floats) -> float:
        table = sums.reshape(far.shape)
        expected = np.outer(table.sum(1), table.sum(0)) / max(table.sum(), 1)
        return 1.0 - _ratio((far * table).sum(), (far * expected).sum())

    _, numbers = np.unique(cluster_U, return_inverse=True)
    return clustered(kappa, by_cluster(parts.reshape(len(first_U), far.size), numbers), resamples)


def fleiss_kappa(ratings_UA: Floats, cluster_U: NDArray[np.int64] | None = None, resamples: int = 1000) -> Interval:
    """Fleiss' kappa over the units with two ratings or more.

    Where units have the same number of ratings it is Fleiss's. Where they do not, each unit counts once: observed
    agreement and the shares of values are means over units.

    Source: Fleiss 1971, "Measuring nominal scale agreement among many raters", equations 1 to 7.
    """
    cluster_U = np.arange(len(ratings_UA)) if cluster_U is None else cluster_U
    counts_UC = counts_of(ratings_UA, values_in(ratings_UA))
    counts_UC, cluster_U = (x[counts_UC.sum(1) >= 2] for x in (counts_UC, cluster_U))
    raters_U = counts_UC.sum(1)
    agreement_U = (counts_UC * (counts_UC - 1)).sum(1) / (raters_U * (raters_U - 1))
    parts = np.concatenate([np.ones((len(raters_U), 1)), agreement_U[:, None], counts_UC / raters_U[:, None]], axis=1)

    def kappa(sums: Floats) -> float:
        if not sums[0]:
            return np.nan
        chance = float(np.square(sums[2:] / sums[0]).sum())
        return _ratio(sums[1] / sums[0] - chance, 1 - chance)

    _, numbers = np.unique(cluster_U, return_inverse=True)
    return clustered(kappa, by_cluster(parts, numbers), resamples)


def every_two(columns: int) -> list[tuple[int, int]]:
    """All pairs of columns."""
    return list(itertools.combinations(range(columns), 2))


def _ratio(above: Any, below: Any) -> float:
    return float(above / below) if abs(below) > 1e-12 else np.nan
