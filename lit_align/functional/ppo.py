"""Proximal policy optimisation: the clipped losses, per token."""

from __future__ import annotations

import torch
from torch import Tensor


def ppo_policy_loss(logps_S: Tensor, old_logps_S: Tensor, advantages_S: Tensor, clip: float = 0.2) -> Tensor:
    """max(-A ratio, -A clip(ratio, 1 - clip, 1 + clip)), with ratio = exp(logp - old logp).

    Args:
        logps_S: log-probabilities under the policy that is trained. Shape (S,).
        old_logps_S: log-probabilities under the policy that sampled. Shape (S,).
        advantages_S: shape (S,).
        clip: epsilon; above 0.

    Returns:
        Loss of each token. Shape (S,).

    Source: Schulman et al. 2017, "Proximal Policy Optimization Algorithms", equation 7.
    """
    ratio_S = (logps_S - old_logps_S).exp()
    clipped_S = ratio_S.clamp(1.0 - clip, 1.0 + clip)
    return torch.maximum(-advantages_S * ratio_S, -advantages_S * clipped_S)


def ppo_value_loss(values_S: Tensor, old_values_S: Tensor, returns_S: Tensor, clip: float | None = 0.2) -> Tensor:
    """Half the squared error, with the change of the value clipped: 1/2 max((V - R)^2, (clip(V) - R)^2).

    Args:
        values_S: values under the model that is trained. Shape (S,).
        old_values_S: values when the rollout was scored. Shape (S,).
        returns_S: targets. Shape (S,).
        clip: how far a value may move from its old one before it stops earning; None for no clipping.

    Returns:
        Loss of each token. Shape (S,).

    Source: Ziegler et al. 2019, lm_human_preferences/train_policy.py; Huang et al. 2024, detail 19.
    """
    squared_S = (values_S - returns_S).square()
    if clip is not None:
        clipped_S = old_values_S + (values_S - old_values_S).clamp(-clip, clip)
        squared_S = torch.maximum(squared_S, (clipped_S - returns_S).square())
    return 0.5 * squared_S


def clip_fraction(logps_S: Tensor, old_logps_S: Tensor, clip: float = 0.2) -> Tensor:
    """Share of tokens whose ratio lies outside [1 - clip, 1 + clip]; a scalar in [0, 1]."""
    ratio_S = (logps_S - old_logps_S).exp()
    return ((ratio_S - 1.0).abs() > clip).to(ratio_S.dtype).mean()


def explained_variance(values_S: Tensor, returns_S: Tensor) -> Tensor:
    """1 - Var(return - value) / Var(return): 1 is perfect, 0 no better than a constant, below 0 worse.

    Returns:
        A scalar; NaN when all returns are equal, as there is then nothing to explain.
    """
    variance = returns_S.var(unbiased=False)
    residual = (returns_S - values_S).var(unbiased=False)
    # The variance of equal numbers is seldom exactly 0: their mean is rounded.
    return torch.where((returns_S != returns_S[:1]).any(), 1.0 - residual / variance, torch.nan)
