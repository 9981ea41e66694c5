"""Over-optimisation: what a proxy reward's optimum is worth in gold reward, against the distance travelled."""

from __future__ import annotations

from collections.abc import Sequence
from math import comb, exp, sqrt
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lit_align.evaluation.intervals import Interval, mean_interval
from lit_align.functional.kl import best_of_n_kl

Floats = NDArray[np.float64]
Form = Literal["best_of_n", "rl"]


def best_of_n(proxy: ArrayLike, gold: ArrayLike, n: int) -> Floats:
    """Expected gold reward of the best of n answers by the proxy, from N >= n samples of each prompt.

    Unbiased: the mean over all subsets of n of the N samples. Sorted by the proxy, the i-th of N samples is the best of
    C(i - 1, n - 1) of the C(N, n) subsets. Answers that the proxy does not tell apart win in turn.

    Args:
        proxy: rewards that choose. Shape (E, N).
        gold: rewards that count; the proxy again gives what the proxy promises. Shape (E, N).
        n: answers that the best is chosen from.

    Returns:
        Shape (E,).

    Raises:
        ValueError: n is not in 1 .. N; shapes differ; a NaN.

    Source: Nakano et al. 2021, "WebGPT", appendix I.
    """
    proxy_EN, gold_EN = np.asarray(proxy, np.float64), np.asarray(gold, np.float64)
    if proxy_EN.shape != gold_EN.shape or proxy_EN.ndim != 2:
        raise ValueError(f"proxy {proxy_EN.shape} and gold {gold_EN.shape} must have one shape (prompts, samples)")
    if np.isnan(proxy_EN).any() or np.isnan(gold_EN).any():
        raise ValueError("a reward is NaN: leave the prompt out and count it")
    samples = proxy_EN.shape[1]
    if not 1 <= n <= samples:
        raise ValueError(f"best of {n} needs n between 1 and the {samples} samples of each prompt")
    # Python's integers are exact; the quotient of two long ones is a float.
    weights_N = np.array([comb(i, n - 1) / comb(samples, n) for i in range(samples)])
    order_EN = np.argsort(proxy_EN, 1, kind="stable")
    sorted_EN, gold_EN = (np.take_along_axis(x_EN, order_EN, 1) for x_EN in (proxy_EN, gold_EN))
    for row, values in zip(sorted_EN, gold_EN, strict=True):
        starts = np.flatnonzero(np.concatenate([[True], row[1:] != row[:-1]]))
        if len(starts) < samples:
            for tied in np.split(np.arange(samples), starts[1:]):
                values[tied] = values[tied].mean()
    return gold_EN @ weights_N


class Fit(NamedTuple):
    """Coefficients of R(d) = d (a - b d) (best of n) or d (a - b log d) (reinforcement learning); d = sqrt(KL in nats).

    Attributes:
        form: which of the two.
        a: slope at the start; reward per sqrt(nat).
        b: how much the slope falls.
    """

    form: Form
    a: float
    b: float

    def __call__(self, d: ArrayLike) -> Floats:
        """The reward at some distances, 0 at 0. Any shape."""
        return _columns(np.asarray(d, np.float64), self.form) @ np.array([self.a, self.b])

    @property
    def peak(self) -> tuple[float, float]:
        """Distance and reward of the maximum; infinite where b <= 0, as the reward then never falls.

        a / 2b and a^2 / 4b for best of n; exp(a / b - 1) and b exp(a / b - 1) for reinforcement learning.
        """
        if self.b <= 0:
            return np.inf, np.inf
        if self.form == "best_of_n":
            return self.a / (2 * self.b), self.a**2 / (4 * self.b)
        power = self.a / self.b - 1
        d = exp(power) if power < 700 else np.inf
        return d, self.b * d


def _columns(d: Floats, form: Form) -> Floats:
    """What a and b multiply. Shape (..., 2)."""
    if form == "best_of_n":
        return np.stack([d, -d * d], -1)
    if form != "rl":
        raise ValueError(f"unknown form {form!r}: choose best_of_n or rl")
    return np.stack([d, -d * np.log(np.where(d > 0, d, 1.0))], -1)


def fit(d: ArrayLike, reward: ArrayLike, form: Form) -> Fit:
    """Least squares: both forms are linear in a and b.

    Args:
        d: sqrt(KL in nats) of each policy. Shape (M,).
        reward: gain over the initial policy. Shape (M,).
        form: best_of_n or rl.

    Raises:
        ValueError: fewer than two different distances above 0.

    Source: Gao, Schulman and Hilton 2023, "Scaling Laws for Reward Model Overoptimization", section 3.1.
    """
    d_M, reward_M = np.asarray(d, np.float64), np.asarray(reward, np.float64)
    if len(np.unique(d_M[d_M > 0])) < 2:
        raise ValueError(f"two coefficients need two different distances above 0, got {d_M.tolist()}")
    (a, b), *_ = np.linalg.lstsq(_columns(d_M, form), reward_M, rcond=None)
    return Fit(form, float(a), float(b))


def fit_with_intervals(
    d: ArrayLike,
    reward: ArrayLike,
    form: Form,
    held_out: Sequence[int] = (),
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """Fit one of the forms, with intervals by resampling prompts (or seeds) whole, and the error on held-out points.

    Args:
        d: sqrt(KL in nats) of each policy. Shape (M,).
        reward: gain of each prompt's answers over the initial policy. Shape (E, M).
        form: best_of_n or rl.
        held_out: which of the M policies the fit does not see, and is held against.
        level: confidence.
        resamples: of the bootstrap.
        seed: of the resampling.

    Returns:
        a, b, peak_d and peak_reward as `Interval`; `no_peak`, the share of resamples whose reward never falls;
        `observed` and `predicted` at every point; and of held-out points `rmse`, `rmse_flat` (that of the last fitted
        reward going on), and `inside`, the share whose observed mean lies within the prediction's interval.
    """
    d_M, reward_EM = np.asarray(d, np.float64), np.asarray(reward, np.float64)
    if reward_EM.ndim != 2 or reward_EM.shape[1] != len(d_M):
        raise ValueError(f"rewards {reward_EM.shape} must be (prompts, policies) with {len(d_M)} policies")
    seen = [m for m in range(len(d_M)) if m not in set(held_out)]
    observed_M = reward_EM.mean(0)
    best = fit(d_M[seen], observed_M[seen], form)
    prompts = len(reward_EM)
    rng = np.random.default_rng(seed)
    solve = np.linalg.pinv(_columns(d_M[seen], form))
    # Counts of how often each prompt is drawn: one matrix product for all resamples.
    drawn_BE = rng.multinomial(prompts, np.full(prompts, 1 / prompts), resamples) / prompts
    fits = [Fit(form, a, b) for a, b in (drawn_BE @ reward_EM[:, seen] @ solve.T).tolist()]
    peaks = np.array([one.peak for one in fits])
    predicted_BM = np.array([one(d_M) for one in fits])
    ends = ((1 - level) / 2, (1 + level) / 2)

    def interval(value: float, values: Floats) -> Interval:
        # "lower" and "higher" pick a resample: between a number and an infinity there is no mean.
        low = np.quantile(values, ends[0], method="lower")
        high = np.quantile(values, ends[1], method="higher")
        bounds = (float(low), float(high)) if prompts > 1 else (np.nan, np.nan)
        return Interval(value, *bounds, observations=len(seen), clusters=prompts)

    predicted_M = best(d_M)
    result: dict[str, Any] = {
        "form": form,
        "a": interval(best.a, np.array([one.a for one in fits])),
        "b": interval(best.b, np.array([one.b for one in fits])),
        "peak_d": interval(best.peak[0], peaks[:, 0]),
        "peak_reward": interval(best.peak[1], peaks[:, 1]),
        "no_peak": float(np.isinf(peaks[:, 0]).mean()),
        "d": d_M.tolist(),
        "observed": observed_M.tolist(),
        "predicted": [interval(predicted_M[m], predicted_BM[:, m]) for m in range(len(d_M))],
    }
    if len(held_out):
        out = list(held_out)
        error = observed_M[out] - predicted_M[out]
        low, high = np.quantile(predicted_BM[:, out], ends, axis=0)
        result["held_out"] = {
            "d": d_M[out].tolist(),
            "rmse": float(np.sqrt(np.mean(error**2))),
            "rmse_flat": float(np.sqrt(np.mean((observed_M[out] - observed_M[seen[-1]]) ** 2))),
            "inside": float(np.mean((low <= observed_M[out]) & (observed_M[out] <= high))),
        }
    return result


def best_of_n_curve(
    proxy: ArrayLike, gold: ArrayLike, most_fitted: int = 64, resamples: int = 1000, seed: int = 0
) -> dict[str, Any]:
    """Proxy and gold reward of best-of-n for n = 1, 2, 4, ... N, and the fit on small n held against large n.

    Args:
        proxy: rewards that choose. Shape (E, N).
        gold: rewards that count. Shape (E, N).
        most_fitted: the fit sees n up to here; larger n are held out.
        resamples: of the bootstrap over prompts.
        seed: of the resampling.

    Returns:
        `points`, for each n its KL bound in nats, d, proxy and gold gain with intervals; `fit` of
        `fit_with_intervals`, or null with the reason in `no_fit`.
    """
    proxy_EN, gold_EN = np.asarray(proxy, np.float64), np.asarray(gold, np.float64)
    samples = proxy_EN.shape[1]
    counts = sorted({*(2**k for k in range(samples.bit_length())), samples})
    prompts = range(len(proxy_EN))
    gains = []
    points = []
    for n in counts:
        gain_E = best_of_n(proxy_EN, gold_EN, n) - gold_EN.mean(1)
        promised_E = best_of_n(proxy_EN, proxy_EN, n) - proxy_EN.mean(1)
        gains.append(gain_E)
        points.append(
            {
                "n": n,
                "kl_bound": best_of_n_kl(n),
                "d": sqrt(best_of_n_kl(n)),
                "proxy": mean_interval(promised_E, prompts, resamples=resamples, seed=seed),
                "gold": mean_interval(gain_E, prompts, resamples=resamples, seed=seed),
            }
        )
    fitted = [m for m, n in enumerate(counts) if 1 < n <= most_fitted]
    if len(fitted) < 2:
        return {"points": points, "fit": None, "no_fit": f"two coefficients need n = 2 and 4, got {samples} samples"}
    d = [sqrt(best_of_n_kl(n)) for n in counts[1:]]
    held_out = [m - 1 for m, n in enumerate(counts) if n > most_fitted]
    result = fit_with_intervals(d, np.array(gains[1:]).T, "best_of_n", held_out, resamples=resamples, seed=seed)
    return {"points": points, "fit": result, "no_fit": None}


__all__ = ["Fit", "best_of_n", "best_of_n_curve", "fit", "fit_with_intervals"]
