"""Length: how much of a reward, and of a gain in reward, the length of answers explains."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import expit
from scipy.stats import rankdata

from lit_align.evaluation.intervals import Interval, numbered, statistic_interval

Floats = NDArray[np.float64]
RIDGE = 1e-3


def words(text: str) -> int:
    """Words of a text, as white space separates them."""
    return len(text.split())


def pearson(x: Floats, y: Floats) -> float:
    """Pearson's correlation; NaN where one of the two is constant."""
    dx, dy = x - x.mean(), y - y.mean()
    # A constant's deviations are rounding errors.
    scale = np.sqrt((dx @ dx) * (dy @ dy))
    tiny = 1e-12 * len(x) * (np.abs(x).max(initial=0) + 1e-300) * (np.abs(y).max(initial=0) + 1e-300)
    return float(dx @ dy / scale) if len(x) > 1 and scale > tiny else np.nan


def length_correlation(
    reward: ArrayLike, length: ArrayLike, clusters: Sequence[Hashable], resamples: int = 500, seed: int = 0
) -> dict[str, Interval]:
    """Correlation of reward and length: over all answers (Pearson, Spearman), and within prompts.

    Within prompts both are taken as deviations from their prompt's mean: prompts that call for long answers and get
    high rewards do not count.

    Args:
        reward: of each answer. Shape (N,).
        length: of each answer. Shape (N,).
        clusters: prompt of each answer. Length N.
        resamples: of the bootstrap over prompts.
        seed: of the resampling.
    """
    x, y, groups = np.asarray(length, np.float64), np.asarray(reward, np.float64), numbered(clusters)
    sizes = np.maximum(np.bincount(groups), 1)
    within_x, within_y = (v - (np.bincount(groups, v) / sizes)[groups] for v in (x, y))

    def interval(a: Floats, b: Floats, ranked: bool = False) -> Interval:
        def of(i: NDArray[np.int64]) -> float:
            return pearson(rankdata(a[i]), rankdata(b[i])) if ranked else pearson(a[i], b[i])

        return statistic_interval(of, groups, resamples=resamples, seed=seed)

    return {"pearson": interval(x, y), "spearman": interval(x, y, True), "within_prompt": interval(within_x, within_y)}


def within_bucket_gain(
    before_reward: ArrayLike,
    before_length: ArrayLike,
    after_reward: ArrayLike,
    after_length: ArrayLike,
    width: float = 20.0,
) -> dict[str, float]:
    """The part of a gain in reward that is left among answers of the same length.

    Args:
        before_reward: of the first policy's answers. Shape (N,).
        before_length: of the same. Shape (N,).
        after_reward: of the second policy's answers. Shape (M,).
        after_length: of the same. Shape (M,).
        width: of a bucket of lengths, in their unit.

    Returns:
        `gain`, the difference of mean rewards; `within`, the mean over buckets of that difference, weighted by their
        answers (non-length reward gain); `ratio` of the two, which is the share of the gain that length does not
        explain; `outside`, the share of answers in buckets that only one policy reaches, which `within` leaves out.
        NaN where no bucket has answers of both.

    Source: Singhal et al. 2023, "A Long Way to Go: Investigating Length Correlations in RLHF", section 3.2.
    """
    rewards = [np.asarray(r, np.float64) for r in (before_reward, after_reward)]
    buckets = [np.floor(np.asarray(length, np.float64) / width).astype(int) for length in (before_length, after_length)]
    gain = float(rewards[1].mean() - rewards[0].mean())
    weights, gains = [], []
    for bucket in sorted(set(buckets[0].tolist()) & set(buckets[1].tolist())):
        before, after = (r[b == bucket] for r, b in zip(rewards, buckets, strict=True))
        weights.append(len(before) + len(after))
        gains.append(after.mean() - before.mean())
    total = len(rewards[0]) + len(rewards[1])
    within = float(np.average(gains, weights=weights)) if weights else np.nan
    ratio = within / gain if gain else np.nan
    return {"gain": gain, "within": within, "ratio": ratio, "outside": 1 - sum(weights) / total}


def explained_variance(
    margin: ArrayLike, length: ArrayLike, clusters: Sequence[Hashable], resamples: int = 500, seed: int = 0
) -> Interval:
    """Share of the variance of a (DPO's implicit) reward that a line in length explains: R^2.

    Args:
        margin: reward of each answer, or difference of rewards of each pair. Shape (N,).
        length: of each answer, or difference of lengths. Shape (N,).
        clusters: prompt of each. Length N.
        resamples: of the bootstrap over prompts.
        seed: of the resampling.

    Source: Park et al. 2024, "Disentangling Length from Quality in Direct Preference Optimization", figure 4.
    """
    x, y = np.asarray(length, np.float64), np.asarray(margin, np.float64)
    return statistic_interval(lambda i: pearson(x[i], y[i]) ** 2, clusters, resamples=resamples, seed=seed)


def length_controlled_win_rate(
    outcome: ArrayLike, length_difference: ArrayLike, clusters: Sequence[Hashable], resamples: int = 300, seed: int = 0
) -> Interval:
    """Win rate that a logistic model predicts for answers of equal length.

    The model is outcome ~ sigmoid(quality + slope tanh(difference / sd)), with a small ridge on the slope, so that it
    stays finite where length decides everything.

    Args:
        outcome: 1 win, 0 loss, 0.5 tie. Shape (N,).
        length_difference: length of the first policy's answer less that of the second's. Shape (N,).
        clusters: prompt of each. Length N.
        resamples: of the bootstrap over prompts.
        seed: of the resampling.

    Source: Dubois et al. 2024, "Length-Controlled AlpacaEval", equation 2, without its term for the instruction.
    """
    y, d = np.asarray(outcome, np.float64), np.asarray(length_difference, np.float64)

    def of(i: NDArray[np.int64]) -> float:
        spread = d[i].std()
        x = np.tanh(d[i] / spread) if spread > 0 else np.zeros(len(i))

        columns = np.stack([np.ones(len(i)), x], 1)
        theta = np.zeros(2)
        for _ in range(30):  # Newton's method on the mean loss + RIDGE |theta|^2, which is strictly convex
            p = expit(columns @ theta)
            gradient = columns.T @ (p - y[i]) / len(i) + 2 * RIDGE * theta
            curvature = (columns * (p * (1 - p))[:, None]).T @ columns / len(i) + 2 * RIDGE * np.eye(2)
            step = np.linalg.solve(curvature, gradient)
            theta = theta - step * min(1.0, 2.0 / max(float(np.abs(step).max()), 1e-12))
            if np.abs(step).max() < 1e-9:
                break
        return float(expit(theta[0]))

    return statistic_interval(of, clusters, resamples=resamples, seed=seed)


def length_balanced(difference: ArrayLike, seed: int = 0) -> NDArray[np.int64]:
    """Pairs among which the longer answer is as often the better one: for each size of the difference, both signs.

    Args:
        difference: length of the better answer less that of the worse. Shape (P,).
        seed: which of the too many are left out.

    Returns:
        Indices of the pairs that stay, ascending; those of equal length do.

    Source: Singhal et al. 2023, section 4.1.
    """
    d = np.asarray(difference, np.float64)
    rng = np.random.default_rng(seed)
    kept = [np.flatnonzero(d == 0)]
    # Differences of a factor of 1.5 and more are different sizes.
    size = np.floor(np.log(np.maximum(np.abs(d), 1)) / np.log(1.5)).astype(int)
    for one in np.unique(size[d != 0]):
        longer, shorter = (np.flatnonzero((size == one) & (d * sign > 0)) for sign in (1, -1))
        room = min(len(longer), len(shorter))
        kept += [rng.choice(side, room, replace=False) for side in (longer, shorter)]
    return np.sort(np.concatenate(kept))
