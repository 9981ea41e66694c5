"""Proximal policy optimisation: clipped losses per token, and the weights that sum tokens into one loss."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

LossAggregation = Literal["token", "sequence", "constant"]


def ppo_policy_loss(
    logps_S: Tensor,
    old_logps_S: Tensor,
    advantages_S: Tensor,
    clip: float = 0.2,
    clip_high: float | None = None,
    dual_clip: float | None = None,
) -> Tensor:
    """max(-A ratio, -A clip(ratio, 1 - clip, 1 + clip_high)), with ratio = exp(logp - old logp).

    Args:
        logps_S: log-probabilities under the policy that is trained. Shape (S,).
        old_logps_S: log-probabilities under the policy that sampled. Shape (S,).
        advantages_S: shape (S,).
        clip: epsilon, above 0.
        clip_high: epsilon above 1; None uses `clip` on both sides. A larger one lets rare tokens grow (clip-higher).
        dual_clip: c, above 1: where A < 0 the loss is at most -c A, and its gradient is then 0. A token whose ratio has
            exploded cannot dominate the step. None for no limit.

    Returns:
        Loss of each token. Shape (S,).

    Source: Schulman et al. 2017, "Proximal Policy Optimization Algorithms", equation 7; clip_high: Yu et al. 2025,
    "DAPO: An Open-Source LLM Reinforcement Learning System at Scale", section 3.1; dual_clip: Ye et al. 2020,
    "Mastering Complex Control in MOBA Games with Deep Reinforcement Learning", equation 5.
    """
    ratio_S = (logps_S - old_logps_S).exp()
    clipped_S = ratio_S.clamp(1.0 - clip, 1.0 + (clip if clip_high is None else clip_high))
    loss_S = torch.maximum(-advantages_S * ratio_S, -advantages_S * clipped_S)
    if dual_clip is None:
        return loss_S
    return torch.where(advantages_S < 0, torch.minimum(loss_S, -dual_clip * advantages_S), loss_S)


def ppo_value_loss(values_S: Tensor, old_values_S: Tensor, returns_S: Tensor, clip: float | None = 0.2) -> Tensor:
    """Half the squared error, with the change of the value clipped: 1/2 max((V - R)^2, (clip(V) - R)^2).

    Args:
        values_S: values under the model that is trained. Shape (S,).
        old_values_S: values when the rollout was scored. Shape (S,).
        returns_S: targets. Shape (S,).
        clip: maximum useful change of a value from its old one; None for no clipping.

    Returns:
        Loss of each token. Shape (S,).

    Source: Ziegler et al. 2019, lm_human_preferences/train_policy.py; Huang et al. 2024, detail 19.
    """
    squared_S = (values_S - returns_S).square()
    if clip is not None:
        clipped_S = old_values_S + (values_S - old_values_S).clamp(-clip, clip)
        squared_S = torch.maximum(squared_S, (clipped_S - returns_S).square())
    return 0.5 * squared_S


def aggregation_weights(
    sequence_S: Tensor, num_sequences: int, aggregation: LossAggregation = "token", length: int = 1
) -> tuple[Tensor, int]:
    """Weight of each token: an optimizer step's loss is the weighted sum over its tokens divided by the sum of counts.

    Args:
        sequence_S: sequence of each token, ascending. Shape (S,).
        num_sequences: Q.
        aggregation: `token` is the mean over all tokens; long completions weigh more (PPO, DAPO). `sequence` is the
            mean over sequences of their token means; a token of a long completion weighs less (GRPO). `constant` sums
            the tokens of a sequence, divides by `length`, and averages over sequences: the policy gradient itself up
            to a constant (Dr. GRPO).
        length: divisor of `constant`, such as the maximum completion length in tokens.

    Returns:
        Weights, shape (S,), and the count that divides their sum: S for `token`, otherwise Q.

    Raises:
        ValueError: unknown aggregation.

    Source: DAPO, equation 12 (token); Shao et al. 2024, "DeepSeekMath", equation 3 (sequence); Liu et al. 2025,
    "Understanding R1-Zero-Like Training", section 3.2 (constant).
    """
    ones_S = torch.ones(sequence_S.shape, device=sequence_S.device)
    if aggregation == "token":
        return ones_S, sequence_S.numel()
    if aggregation == "sequence":
        return ones_S / torch.bincount(sequence_S, minlength=num_sequences)[sequence_S], num_sequences
    if aggregation == "constant":
        return ones_S / length, num_sequences
    raise ValueError(f"unknown aggregation {aggregation!r}: choose token, sequence or constant")


def clip_fraction(logps_S: Tensor, old_logps_S: Tensor, clip: float = 0.2, clip_high: float | None = None) -> Tensor:
    """Share of tokens whose ratio lies outside [1 - clip, 1 + clip_high]; a scalar in [0, 1], 0 without tokens."""
    excess_S = (logps_S - old_logps_S).exp() - 1.0
    outside_S = (excess_S < -clip) | (excess_S > (clip if clip_high is None else clip_high))
    return outside_S.sum() / max(len(outside_S), 1)


def explained_variance(values_S: Tensor, returns_S: Tensor) -> Tensor:
    """1 - Var(return - value) / Var(return): 1 is perfect, 0 no better than a constant, below 0 worse.

    Returns:
        A scalar; NaN if all returns are equal.
    """
    variance = returns_S.var(unbiased=False)
    residual = (returns_S - values_S).var(unbiased=False)
    # Compare values, not the variance: rounding of the mean leaves a variance just above 0.
    return torch.where((returns_S != returns_S[:1]).any(), 1.0 - residual / variance, torch.nan)


def off_policy_drift(logps_S: Tensor, sampled_S: Tensor) -> tuple[Tensor, Tensor]:
    """Difference between the trained policy and the engine that sampled from it; they should be equal.

    Different kernels, precision or cache order change every log-probability a little. Weights that were not
    synchronised, or a temperature that only one of the two applies, change them a lot.

    Args:
        logps_S: log-probabilities of the sampled tokens under the policy before the first update. Shape (S,).
        sampled_S: log-probabilities that the engine reported when it sampled them. Shape (S,).

    Returns:
        Probability ratio of each token (policy over engine), and 1.0 where it is outside [0.9, 1.1], else 0.0. Each of
        shape (S,).
    """
    ratio_S = (logps_S - sampled_S).exp()
    return ratio_S, ((ratio_S < 0.9) | (ratio_S > 1.1)).to(ratio_S)
