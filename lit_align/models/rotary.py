"""Rotary position embeddings without copies, for CPUs.

transformers turns queries and keys by way of a rotated copy of each, and the gradient of its two halves is two whole
tensors, of zeros but for a half. Four products over the tensor are all that there is to do, and its gradient is the
same turn backwards.

Source: Su et al. 2021, "RoFormer: Enhanced Transformer with Rotary Position Embedding", equation 34.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

NAME = "apply_rotary_pos_emb"  # of transformers' modeling files


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn pairs of numbers, one in each half of a head, by the angles of their positions.

    Args:
        x: shape (B, heads, T, D), or any that the others broadcast to.
        cos: of the angles, the same in both halves. Shape (B, 1, T, D).
        sin: likewise.

    Returns:
        Like `x`.
    """
    if not torch.is_grad_enabled():
        return _turn(x, cos, sin)
    turned: Tensor = _Turn.apply(x, cos, sin)
    return turned


class _Turn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turn(grad, cos, -sin), None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    turned, half = x * cos, x.shape[-1] // 2
    sin = sin[..., :half]
    turned[..., :half].addcmul_(x[..., half:], sin, value=-1)
    turned[..., half:].addcmul_(x[..., :half], sin)
    return turned


def turn_without_copies(model: PreTrainedModel) -> None:
    """Let the attention layers of a model's modeling file use `turn` on a CPU, if theirs does the same."""
    for name in {type(module).__module__ for module in model.modules()}:
        theirs = getattr(sys.modules[name], NAME, None)
        if name.startswith("transformers.") and theirs is not None and not hasattr(theirs, "theirs") and _same(theirs):
            setattr(sys.modules[name], NAME, _instead_of(theirs))


def _instead_of(theirs: Callable[..., Any]) -> Callable[..., Any]:
    def turned(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> Any:
        alike = q.dtype == k.dtype == cos.dtype and q.shape[-1] == cos.shape[-1]
        if q.device.type != "cpu" or not alike or torch.compiler.is_compiling():
            return theirs(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)
        cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
        return turn(q, cos, sin), turn(k, cos, sin)

    turned.theirs = theirs  # type: ignore[attr-defined]
    return turned


def _same(theirs: Callable[..., Any]) -> bool:
    """Whether a function of that name does the same: some turn neighbouring numbers, or have other arguments."""
    seeded = torch.Generator().manual_seed(0)
    # Lightning makes models with the GPU as the place of new tensors, and in the run's precision.
    here: Any = {"generator": seeded, "device": "cpu", "dtype": torch.float32}
    q, k = (torch.randn(1, heads, 3, 8, **here) for heads in (2, 1))
    angles = torch.randn(1, 3, 4, **here).repeat(1, 1, 2)
    try:
        expected = theirs(q, k, angles.cos(), angles.sin(), unsqueeze_dim=1)
    except (TypeError, ValueError, RuntimeError, IndexError):
        return False
    got = _instead_of(theirs)(q, k, angles.cos(), angles.sin())
    return all(torch.allclose(a, b, atol=1e-6) for a, b in zip(expected, got, strict=True))
