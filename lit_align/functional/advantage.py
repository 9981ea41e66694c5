"""Returns and advantages of ragged episodes: one reward and one value per token, without padding.

An episode is a run of equal, ascending `sequence_S`; its last token is terminal.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _grid(sequence_S: Tensor, num_sequences: int) -> tuple[Tensor, Tensor, int]:
    """Row and column of each token in a (sequences, longest) grid, and the number of columns."""
    lengths_Q = torch.bincount(sequence_S, minlength=num_sequences)
    starts_Q = lengths_Q.cumsum(0) - lengths_Q
    column_S = torch.arange(sequence_S.numel(), device=sequence_S.device) - starts_Q[sequence_S]
    return sequence_S, column_S, int(lengths_Q.max()) if num_sequences else 0


def gae(
    rewards_S: Tensor,
    values_S: Tensor,
    sequence_S: Tensor,
    num_sequences: int,
    discount: float = 1.0,
    lambda_: float = 0.95,
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation.

    A_t = sum_l (discount * lambda)^l delta_{t+l} with delta_t = r_t + discount V_{t+1} - V_t, and V = 0 after the last
    token of an episode.

    Args:
        rewards_S: reward for each token. Shape (S,).
        values_S: value of the state before each token. Shape (S,).
        sequence_S: episode of each token, ascending. Shape (S,).
        num_sequences: Q.
        discount: gamma, in [0, 1].
        lambda_: in [0, 1]; 1 gives return - value, 0 the one-step error.

    Returns:
        Advantages and returns (advantage + value), each of shape (S,).

    Source: Schulman et al. 2016, "High-Dimensional Continuous Control Using GAE", equations 11 and 16.
    """
    row_S, column_S, longest = _grid(sequence_S, num_sequences)
    # One episode per row, left-aligned. Rewards and values after its end are 0, so advantages there are 0 too.
    rewards_QT = rewards_S.new_zeros(num_sequences, longest)
    values_QT = values_S.new_zeros(num_sequences, longest + 1)
    rewards_QT[row_S, column_S] = rewards_S
    values_QT[row_S, column_S] = values_S
    deltas_QT = rewards_QT + discount * values_QT[:, 1:] - values_QT[:, :-1]
    advantages_QT = torch.zeros_like(rewards_QT)
    running_Q = rewards_S.new_zeros(num_sequences)
    for t in reversed(range(longest)):
        running_Q = deltas_QT[:, t] + discount * lambda_ * running_Q
        advantages_QT[:, t] = running_Q
    advantages_S = advantages_QT[row_S, column_S]
    return advantages_S, advantages_S + values_S


def whiten(
    values_S: Tensor, mean: Tensor | None = None, variance: Tensor | None = None, shift_mean: bool = True
) -> Tensor:
    """Scale to variance 1 and, by default, shift to mean 0.

    Args:
        values_S: shape (S,).
        mean: mean to use instead of that of `values_S`, such as the mean over all ranks.
        variance: variance to use, the biased one as in the original code.
        shift_mean: False scales and keeps the mean, for rewards whose sign matters.

    Returns:
        Shape (S,).

    Source: Ziegler et al. 2019, lm_human_preferences/utils/core.py `whiten`; Huang et al. 2024, "The N Implementation
    Details of RLHF with PPO", detail 18 (biased variance, epsilon 1e-8).
    """
    mean = values_S.mean() if mean is None else mean
    variance = values_S.var(unbiased=False) if variance is None else variance
    whitened_S = (values_S - mean) * (variance + 1e-8).rsqrt()
    return whitened_S if shift_mean else whitened_S + mean
