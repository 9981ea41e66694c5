"""Supervised fine-tuning: negative log-likelihood of the scored tokens."""

from __future__ import annotations

from torch import Tensor


def sft_loss(logps_S: Tensor) -> tuple[Tensor, int]:
    """Sum of negative log-likelihoods, and how many tokens it is a sum of.

    The two leave separately: a mean per micro-batch, averaged over micro-batches, weighs a token by the length of the
    micro-batch it happened to fall in (10 % off on ragged data). The caller divides once per optimizer step, by the
    count over all micro-batches and ranks. PPO-ptx (Ouyang et al. 2022, equation 2) adds this same loss, on
    pretraining text, to PPO's.

    Args:
        logps_S: log-probability of each scored token, in nats. Shape (S,).

    Returns:
        Sum in nats (a scalar) and the number of tokens.
    """
    return -logps_S.sum(), logps_S.numel()
