"""Calibration: whether what is held likely comes true as often."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

from lit_align.evaluation.intervals import mean_interval, statistic_interval

Floats = NDArray[np.float64]


def reliability(confidence: ArrayLike, outcome: ArrayLike, bins: int = 10) -> list[dict[str, float]]:
    """Bins of equal width, each with how sure predictions were and how often they came true; empty bins are left out.

    Args:
        confidence: in [0, 1]. Shape (N,).
        outcome: 1 where it came true and 0 where not, or the share of annotators for whom it did. Shape (N,).
        bins: how many, over [0, 1].

    Returns:
        For each bin `low`, `high`, `count`, mean `confidence` and mean `outcome`.

    Source: Guo et al. 2017, "On Calibration of Modern Neural Networks", equations 2 and 3.
    """
    confidence_N, outcome_N = _checked(confidence, outcome)
    bin_N = _bins(confidence_N, bins)
    rows = []
    for b in range(bins):
        here = bin_N == b
        if here.any():
            means = {"confidence": float(confidence_N[here].mean()), "outcome": float(outcome_N[here].mean())}
            rows.append({"low": b / bins, "high": (b + 1) / bins, "count": int(here.sum()), **means})
    return rows


def calibration_error(confidence: ArrayLike, outcome: ArrayLike, bins: int = 10) -> float:
    """Expected calibration error: mean over observations of |confidence - outcome| of their bin; NaN without any.

    Args:
        confidence: in [0, 1]. Shape (N,).
        outcome: in [0, 1]. Shape (N,).
        bins: of equal width over [0, 1].

    Source: Guo et al. 2017, equation 5.
    """
    confidence_N, outcome_N = _checked(confidence, outcome)
    gaps = np.bincount(_bins(confidence_N, bins), confidence_N - outcome_N, bins)
    return float(np.abs(gaps).sum() / len(confidence_N)) if len(confidence_N) else np.nan


def brier_score(probability: ArrayLike, target: ArrayLike) -> Floats:
    """Squared distance between predicted and observed probabilities, for each observation.

    Args:
        probability: of an event, shape (N,), or of each of C classes, shape (N, C).
        target: what was observed, in the same shape.

    Returns:
        Shape (N,). For C classes the sum over classes, in [0, 2], as Brier defined it.

    Source: Brier 1950, "Verification of Forecasts Expressed in Terms of Probability", equation 2.
    """
    squares = (np.asarray(probability, np.float64) - np.asarray(target, np.float64)) ** 2
    return squares if squares.ndim == 1 else squares.sum(1)


def best_temperature(logits: ArrayLike, target: ArrayLike) -> float:
    """The temperature by which logits are divided for the least negative log-likelihood; in [0.01, 100].

    Args:
        logits: of C classes. Shape (N, C).
        target: observed probability of each class. Shape (N, C).

    Source: Guo et al. 2017, section 4.2.
    """
    logits_NC, target_NC = np.asarray(logits, np.float64), np.asarray(target, np.float64)

    def loss(log_temperature: float) -> float:
        return float(-(target_NC * log_softmax(logits_NC / np.exp(log_temperature), 1)).sum(1).mean())

    found = minimize_scalar(loss, bounds=(np.log(0.01), np.log(100)), method="bounded", options={"xatol": 1e-6})
    return float(np.exp(found.x))


def choice_calibration(
    logits: ArrayLike,
    answers: ArrayLike,
    clusters: Sequence[Hashable] | None = None,
    resamples: int = 500,
    seed: int = 0,
) -> dict[str, Any]:
    """Calibration of a policy on questions with one right answer among C.

    Args:
        logits: log-probabilities of the C answers, up to a constant for each question. Shape (N, C).
        answers: index of the right one. Shape (N,).
        clusters: what belongs together, such as the subject; each question alone if None.
        resamples: of the bootstrap.
        seed: of the resampling.

    Returns:
        `accuracy`, `confidence`, `brier` and `ece_10`, `ece_15` as `Interval`; `nll` in nats; `temperature`, which
        repairs most, found on every second question; `ece_10_repaired` and `ece_10_unrepaired` on the others;
        `reliability` of 10 bins.
    """
    logits_NC, answer_N = np.asarray(logits, np.float64), np.asarray(answers, int)
    if not np.isfinite(logits_NC).all():
        raise ValueError(f"{int((~np.isfinite(logits_NC)).any(1).sum())} questions have a log-probability that is NaN")
    groups = range(len(answer_N)) if clusters is None else clusters
    logp_NC = log_softmax(logits_NC, 1)
    p_NC = np.exp(logp_NC)
    right_NC = np.eye(logits_NC.shape[1])[answer_N]
    confidence_N, hit_N = sureness(p_NC, answer_N)

    def ece(bins: int) -> Any:
        return statistic_interval(
            lambda i: calibration_error(confidence_N[i], hit_N[i], bins), groups, resamples=resamples, seed=seed
        )

    fitted, kept = slice(0, None, 2), slice(1, None, 2)
    temperature = best_temperature(logp_NC[fitted], right_NC[fitted])
    repaired_N, _ = sureness(np.exp(log_softmax(logp_NC / temperature, 1)), answer_N)
    return {
        "questions": len(answer_N),
        "accuracy": mean_interval(hit_N, groups, share=True, seed=seed),
        "confidence": mean_interval(confidence_N, groups, seed=seed),
        "brier": mean_interval(brier_score(p_NC, right_NC), groups, seed=seed),
        "nll": float(-(right_NC * logp_NC).sum(1).mean()),
        "ece_10": ece(10),
        "ece_15": ece(15),
        "temperature": temperature,
        "ece_10_unrepaired": calibration_error(confidence_N[kept], hit_N[kept]),
        "ece_10_repaired": calibration_error(repaired_N[kept], hit_N[kept]),
        "reliability": reliability(confidence_N, hit_N),
    }


def sureness(probability_NC: Floats, answer_N: NDArray[Any]) -> tuple[Floats, Floats]:
    """Probability of the most probable answer, and whether it is right; answers that tie share the credit."""
    confidence_N = probability_NC.max(1)
    top_NC = probability_NC >= confidence_N[:, None] * (1 - 1e-12)
    return confidence_N, top_NC[np.arange(len(answer_N)), answer_N] / top_NC.sum(1)


def _bins(confidence_N: Floats, bins: int) -> NDArray[np.int64]:
    # (low, high] as in the paper; a confidence of 0 belongs to the first.
    return np.clip(np.ceil(confidence_N * bins).astype(np.int64) - 1, 0, bins - 1)


def _checked(confidence: ArrayLike, outcome: ArrayLike) -> tuple[Floats, Floats]:
    confidence_N, outcome_N = np.asarray(confidence, np.float64), np.asarray(outcome, np.float64)
    if confidence_N.shape != outcome_N.shape or confidence_N.ndim != 1:
        raise ValueError(f"{confidence_N.shape} confidences for {outcome_N.shape} outcomes: expected one for each")
    # A probability summed in float32 may pass 1 by its last digit.
    both = np.concatenate([confidence_N, outcome_N])
    if len(both) and not (both.min() >= -1e-6 and both.max() <= 1 + 1e-6):
        raise ValueError(f"confidences and outcomes lie in [0, 1], got {both.min()} to {both.max()}")
    return confidence_N.clip(0, 1), outcome_N.clip(0, 1)
