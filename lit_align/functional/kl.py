"""Kullback-Leibler divergence from a reference: exact, estimated from samples, and an adaptive coefficient."""

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

    With r = q / p:

    | estimator | value | bias | can be negative | expected gradient, as a loss |
    |---|---|---|---|---|
    | k1 | -log r | none | yes | 0 |
    | k2 | (log r)^2 / 2 | yes | no | gradient of KL(p, q) |
    | k3 | r - 1 - log r | none | no | gradient of KL(q, p) |
    | k3+ | k3 | none | no | gradient of KL(p, q), as k2 |

    These hold for one token given the tokens before it. As a loss, a token pays for its own KL and not for the KL of
    the tokens it leads to, so the optimum differs from that of a KL penalty in the reward.

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
    """KL(best-of-n || sampling policy) in nats: log n - (n - 1) / n.

    Exact if no two completions are equal and no two scores tie; an upper bound in general.

    Args:
        n: number of completions that the best is chosen from.

    Raises:
        ValueError: n below 1.

    Source: Stiennon et al. 2020, "Learning to summarize from human feedback", appendix G.3; the bound: Beirami
    et al. 2024, "Theoretical guarantees on the best-of-n alignment policy", theorem 1.
    """
    if n < 1:
        raise ValueError(f"best-of-n needs n of at least 1, got {n}")
    return math.log(n) - (n - 1) / n


def adapt_kl_coefficient(coefficient: float, kl: float, target: float, horizon: int, episodes: int) -> float:
    """One update of the adaptive KL controller.

    Args:
        coefficient: current KL coefficient, per nat.
        kl: mean KL per sequence in the last rollout, in nats.
        target: target KL per sequence, in nats; above 0.
        horizon: episodes over which a clipped error of 20 % changes the coefficient by 20 %.
        episodes: episodes in the last rollout.

    Returns:
        The new coefficient. The proportional error is clipped to +-20 %, so one bad rollout changes it little.

    Source: Ziegler et al. 2019, "Fine-Tuning Language Models from Human Preferences", section 2.2.
    """
    error = min(max(kl / target - 1.0, -0.2), 0.2)
    return coefficient * (1.0 + error * episodes / horizon)
