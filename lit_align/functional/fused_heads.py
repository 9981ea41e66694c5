"""`linear_logprobs` by torch's and Liger's kernels, without entropies and without a nucleus.

Both compute logits in chunks, keep none, and recompute them in backward. Only the per-token forms are used: the forms
that sum over tokens compute gradients in forward, so they support a plain sum of tokens and no weights.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn


def torch_logprobs(hidden_SH: Tensor, weight_VH: Tensor, target_S: Tensor, temperature: float = 1.0) -> Tensor:
    """Log p(target) under a linear head without bias, by torch's `linear_cross_entropy`; from torch 2.13 on.

    Args:
        hidden_SH: hidden states in fp32 or float64. The result has their dtype; half precision would leave two or
            three digits of a log-probability. Shape (S, H).
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
        hidden_SH: hidden states, S above 0. Shape (S, H).
        weight_VH: the head, of the same type. Shape (V, H).
        target_S: token ids. Shape (S,).
        temperature: divides the logits; above 0. Must be 1 in half precision, where the division would round again.

    Returns:
        Log-probabilities in nats, always in fp32. Shape (S,).

    Source: Hsu et al. 2024, "Liger Kernel: Efficient Triton Kernels for LLM Training", section 3.2.
    """
    from liger_kernel.ops import LigerFusedLinearCrossEntropyFunction

    cooled_SH = _cooled(hidden_SH, temperature)
    # By position: bias, class weights, ignore_index, z-loss, label smoothing, reduction, softcap, return_z_loss, and
    # the dtype that accumulates the head's gradient: fp32, because bf16 would round small terms away.
    options = None, None, -100, 0.0, 0.0, "none", None, False, torch.float32
    loss_S, *_ = LigerFusedLinearCrossEntropyFunction.apply(cooled_SH, weight_VH, target_S, *options)
    return -loss_S


def _cooled(hidden_SH: Tensor, temperature: float) -> Tensor:
    """Divide the hidden states by the temperature: S x H work instead of S x V."""
    return hidden_SH if temperature == 1.0 else hidden_SH / temperature
