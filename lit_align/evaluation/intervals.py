"""Confidence intervals by a bootstrap over clusters: answers to one prompt are resampled together."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

Floats = NDArray[np.float64]


class Interval(NamedTuple):
    """An estimate with its interval.

    Attributes:
        value: the estimate; NaN without observations.
        low, high: ends of the interval; NaN where fewer than two clusters say how clusters differ.
        observations: how many.
        clusters: independent groups of observations.
    """

    value: float
    low: float
    high: float
    observations: int
    clusters: int

    def json(self) -> dict[str, float | int | None]:
        """With null for NaN, which JSON does not have."""
        return {name: plain(value) for name, value in self._asdict().items()}


def plain(value: Any) -> Any:
    """A value as JSON takes it: null for NaN and infinities, Python's own numbers for numpy's; containers too."""
    if isinstance(value, Interval):
        return value.json()
    if isinstance(value, dict):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(inner) for inner in value]
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not np.isfinite(value) else value


def numbered(clusters: Sequence[Hashable] | NDArray[Any]) -> NDArray[np.int64]:
    """Number clusters 0, 1, ... in the order in which they first come. Shape (N,)."""
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(cluster, len(numbers)) for cluster in clusters], np.int64)


def mean_interval(
    values: ArrayLike,
    clusters: Sequence[Hashable] | NDArray[Any],
    share: bool = False,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Mean over observations, with a percentile bootstrap over clusters.

    The mean is a ratio of two sums over clusters, so that large clusters weigh as much as they have observations.

    Args:
        values: observations. Shape (N,).
        clusters: which cluster each observation belongs to, such as its prompt. Length N.
        share: the values lie in [0, 1]. Where all of them are 0, or all 1, resampling cannot vary them; the interval is
            then Clopper and Pearson's, with one trial for each cluster.
        level: confidence.
        resamples: of the bootstrap.
        seed: of the resampling.

    Raises:
        ValueError: a value that is NaN or infinite; another number of clusters than of values.

    Source: Efron and Tibshirani 1993, "An Introduction to the Bootstrap", section 13.3; Clopper and Pearson 1934.
    """
    x = np.asarray(values, np.float64)
    groups = numbered(clusters)
    if x.shape != groups.shape:
        raise ValueError(f"got {len(x)} values and {len(groups)} clusters: each value belongs to one cluster")
    if not np.isfinite(x).all():
        raise ValueError(f"{int((~np.isfinite(x)).sum())} of {len(x)} values are NaN or infinite: leave them out first")
    if not len(x):
        return Interval(np.nan, np.nan, np.nan, 0, 0)
    sums, counts = np.bincount(groups, x), np.bincount(groups)
    value, number = float(x.mean()), len(sums)
    if number < 2:
        return Interval(value, np.nan, np.nan, len(x), number)
    if share and value in (0.0, 1.0):
        exact = stats.binomtest(number if value else 0, number).proportion_ci(level, method="exact")
        return Interval(value, float(exact.low), float(exact.high), len(x), number)

    def ratio(sums: Floats, counts: Floats, axis: int) -> Floats:
        return sums.sum(axis) / counts.sum(axis)

    low, high = _bootstrap((sums, counts), ratio, True, level, resamples, seed)
    return Interval(value, low, high, len(x), number)


def statistic_interval(
    statistic: Callable[[NDArray[np.int64]], float],
    clusters: Sequence[Hashable] | NDArray[Any],
    level: float = 0.95,
    resamples: int = 500,
    seed: int = 0,
) -> Interval:
    """Any statistic of the observations, with a percentile bootstrap over clusters.

    Args:
        statistic: the estimate from the indices of some observations, which may repeat. Resamples for which it is NaN
            are left out.
        clusters: which cluster each observation belongs to. Length N.
        level: confidence.
        resamples: of the bootstrap.
        seed: of the resampling.
    """
    groups = numbered(clusters)
    if not len(groups):
        return Interval(np.nan, np.nan, np.nan, 0, 0)
    number = int(groups.max()) + 1
    order = np.argsort(groups, kind="stable")
    members = np.split(order, np.cumsum(np.bincount(groups))[:-1])
    value = float(statistic(np.arange(len(groups))))
    if number < 2 or np.isnan(value):
        return Interval(value, np.nan, np.nan, len(groups), number)

    def of_clusters(chosen: NDArray[np.int64]) -> float:
        return float(statistic(np.concatenate([members[cluster] for cluster in chosen])))

    low, high = _bootstrap((np.arange(number),), of_clusters, False, level, resamples, seed)
    return Interval(value, low, high, len(groups), number)


def _bootstrap(
    data: tuple[NDArray[Any], ...],
    statistic: Callable[..., Any],
    vectorized: bool,
    level: float,
    resamples: int,
    seed: int,
) -> tuple[float, float]:
    """Ends of the percentile interval, over the resamples that have a value."""
    # A batch of resamples holds no more than some 32 MB.
    batch = max(min(resamples, 4_000_000 // len(data[0])), 1) if vectorized else resamples
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)
        result = stats.bootstrap(
            data,
            statistic,
            n_resamples=resamples,
            batch=batch,
            vectorized=vectorized,
            paired=True,
            method="percentile",
            confidence_level=level,
            rng=np.random.default_rng(seed),
        )
    drawn = result.bootstrap_distribution
    drawn = drawn[~np.isnan(drawn)]
    if not len(drawn):
        return np.nan, np.nan
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
