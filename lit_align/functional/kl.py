"""Kullback-Leibler divergence from a reference: exact, estimated from samples, and the controller of its price."""

from __future__ import annotations

import math
from typing import Literal

from torch import Tensor

KLEstimator = Literal["k1", "k2", "k3", "k3+"]


def exact_kl(logps_SV: Tensor, reference_SV: Tensor) -> Tensor:
    """KL(p || q) over a whole vocabulary, in nats.

    Args:
        logps_SV: log-probabilities of p; must be normalised. Shape (S, V).
        reference_SV: log-probabilities of q. Shape (S, V).

    Returns:
        Shape (S,).
    """
    probs_SV = logps_SV.exp()
    return (probs_SV * (logps_SV - reference_SV).masked_fill(probs_SV == 0, 0.0)).sum(-1)


def estimate_kl(logps_S: Tensor, reference_S: Tensor, estimator: KLEstimator = "k1") -> Tensor:
    """Estimate KL(p || q) per token from tokens drawn from p, in nats.

    With r = q / p: k1 = -log r is unbiased and can be negative; k2 = (log r)^2 / 2 is biased and never negative;
    k3 = r - 1 - log r is unbiased and never negative. As a *loss* they differ again: the expected gradient of k1 is 0,
    that of k2 is the gradient of the KL, that of k3 is the gradient of the reverse one, KL(q || p). k3+ is k3 with the
    gradient of k2. All of that is of one token given those before it: as a loss, a token pays for its own KL and not
    for the KL of what it leads to, so the optimum is not that of KL in the reward.

    Args:
        logps_S: log p of the sampled tokens. Shape (S,).
        reference_S: log q of the same tokens. Shape (S,).
        estimator: k1, k2, k3 or k3+.

    Returns:
        Shape (S,).

    Raises:
        ValueError: unknown estimator.

    Source: Schulman 2020, "Approximating KL Divergence", http://joschu.net/blog/kl-approx.html; k3 as a loss: Shao et
    al. 2024, "DeepSeekMath", equation 4; k3+ as in verl.
    """
    log_ratio_S = reference_S - logps_S
    if estimator == "k1":
        return -log_ratio_S
    if estimator == "k2":
        return 0.5 * log_ratio_S.square()
    if estimator in ("k3", "k3+"):
        # expm1 keeps the digits near 0, where k3 lives: exp(x) - 1 - x loses them to cancellation.
        k3_S = log_ratio_S.expm1() - log_ratio_S
        if estimator == "k3":
            return k3_S
        k2_S = 0.5 * log_ratio_S.square()
        return k3_S.detach() + (k2_S - k2_S.detach())
    raise ValueError(f"unknown KL estimator {estimator!r}: choose k1, k2, k3 or k3+")


def best_of_n_kl(n: int) -> float:
    """How far best-of-n is from the policy it samples, in nats: log n - (n - 1) / n.

    Exact where no two answers are equal and none scores as another; an upper bound in general.

    Args:
        n: answers that the best is chosen from.

    Raises:
        ValueError: n below 1.

    Source: Stiennon et al. 2020, "Learning to summarize from human feedback", appendix G.3; that it is a bound: Beirami
    et al. 2024, "Theoretical guarantees on the best-of-n alignment policy", theorem 1.
    """
    if n < 1:
        raise ValueError(f"best-of-n needs n of at least 1, got {n}")
    return math.log(n) - (n - 1) / n


def adapt_kl_coefficient(coefficient: float, kl: float, target: float, horizon: int, episodes: int) -> float:
    """One update of the adaptive KL controller.

    Args:
        coefficient: price of a nat of KL now.
        kl: mean KL of a sequence in the last rollout, in nats.
        target: KL wanted, in nats; above 0.
        horizon: episodes over which the largest error that counts, 20 %, moves the price by 20 %.
        episodes: how many episodes the last rollout had.

    Returns:
        The new coefficient. The proportional error is clipped to +-20 %, so one bad rollout cannot move it far.

    Source: Ziegler et al. 2019, "Fine-Tuning Language Models from Human Preferences", section 2.2.
    """
    error = min(max(kl / target - 1.0, -0.2), 0.2)
    return coefficient * (1.0 + error * episodes / horizon)
