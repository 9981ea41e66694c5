"""The work of `linear_logprobs` by kernels of others, where neither entropies nor a nucleus are asked for.

Both make the logits a chunk at a time, hold none, and make them again in backward, when it is known how much each
token's log-probability weighs: their forms that sum over tokens take gradients in forward, and serve a plain sum alone.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn


def torch_logprobs(hidden_SH: Tensor, weight_VH: Tensor, target_S: Tensor, temperature: float = 1.0) -> Tensor:
    """Log p(target) under a linear head without bias, by torch's `linear_cross_entropy`; from torch 2.13 on.

    Args:
        hidden_SH: the states that predict, in fp32 or float64: what comes back has their type, and a log-probability
            in half precision has two or three digits. Shape (S, H).
        weight_VH: the head, of the same type. Shape (V, H).
        target_S: token ids. Shape (S,).
        temperature: divides the logits; above 0.

    Returns:
        Log-probabilities in nats. Shape (S,).
    """
    chunked = nn.LinearCrossEntropyOptions()
    cooled_SH = _cooled(hidden_SH, temperature)
    return -F.linear_cross_entropy(cooled_SH, weight_VH, target_S, reduction="none", options=chunked)


def liger_logprobs(hidden_SH: Tensor, weight_VH: Tensor, target_S: Tensor, temperature: float = 1.0) -> Tensor:
    """Log p(target) under a linear head without bias, by Liger's fused linear cross-entropy, which is in Triton.

    Args:
        hidden_SH: the states that predict, S above 0. Shape (S, H).
        weight_VH: the head, of the same type. Shape (V, H).
        target_S: token ids. Shape (S,).
        temperature: divides the logits; above 0. Of states in half precision 1: they would be rounded once more.

    Returns:
        Log-probabilities in nats, in fp32 whatever the type of the states. Shape (S,).

    Source: Hsu et al. 2024, "Liger Kernel: Efficient Triton Kernels for LLM Training", section 3.2.
    """
    from liger_kernel.ops import LigerFusedLinearCrossEntropyFunction

    cooled_SH = _cooled(hidden_SH, temperature)
    # The arguments go by position: no bias, no weights of words, which target to ignore, no penalty on large logits, no
    # smoothing, one number a token, no cap; and the matrix's gradient is added up in fp32, where bf16 would lose parts.
    options = None, None, -100, 0.0, 0.0, "none", None, False, torch.float32
    loss_S, *_ = LigerFusedLinearCrossEntropyFunction.apply(cooled_SH, weight_VH, target_S, *options)
    return -loss_S


def _cooled(hidden_SH: Tensor, temperature: float) -> Tensor:
    """States whose logits are divided by the temperature: a pass over S x H, not S x V."""
    return hidden_SH if temperature == 1.0 else hidden_SH / temperature
