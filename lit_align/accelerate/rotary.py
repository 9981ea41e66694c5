"""Rotary position embeddings without copies, for CPUs.

transformers turns queries and keys by way of a rotated copy of each, and the gradient of its two halves is two whole
tensors, of zeros but for a half. Four products over the tensor are all that there is to do, and its gradient is the
same turn backwards.

Share of a training step that this saves (experiments/bench/kernels.py): sft 4.3%.

Source: Su et al. 2021, "RoFormer: Enhanced Transformer with Rotary Position Embedding", equation 34.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

NAME = "apply_rotary_pos_emb"  # of transformers' modeling files


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn pairs of numbers, one in each half of a head, by the angles of their positions.

    Args:
        x: shape (B, heads, T, D), or any that the others broadcast to.
        cos: of the angles, the same in both halves. Shape (B, 1, T, D).
        sin: likewise.

    Returns:
        Like `x`.
    """
    if not torch.is_grad_enabled():
        return _rotate(x, cos, sin)
    turned: Tensor = _Rotate.apply(x, cos, sin)
    return turned


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate(grad, cos, -sin), None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    turned, half = x * cos, x.shape[-1] // 2
    sin = sin[..., :half]
    turned[..., :half].addcmul_(x[..., half:], sin, value=-1)
    turned[..., half:].addcmul_(x[..., :half], sin)
    return turned


def put_on_rotary(model: nn.Module) -> None:
    """Put `rotate` on the attention layers of this model, each if the function that its class calls does the same."""
    for module in model.modules():
        kind: Any = type(module)
        if "forward" not in vars(module) and forward_with_rotation(kind) is not None:
            # A deep copy of the model binds it to the copy, and so does pickle; a bound method is not found again.
            module.forward = partial(_forward, module)


def put_off_rotary(model: nn.Module) -> None:
    """Undo `put_on_rotary`."""
    for module in model.modules():
        forward = vars(module).get("forward")
        if isinstance(forward, partial) and forward.func is _forward:
            del module.forward


def _forward(self: Any, *args: Any, **options: Any) -> Any:
    kind: Any = type(self)
    if torch.compiler.is_compiling():  # the compiler traces transformers' own forward: it does not trace a cache
        return kind.forward(self, *args, **options)
    forward: Any = forward_with_rotation(kind)
    return forward(self, *args, **options)


@cache
def forward_with_rotation(kind: Any) -> Callable[..., Any] | None:
    """Copy the forward of a class of transformers, with `rotate` for its rotary function; None if there is none alike.

    The copy differs in the names that it sees, and its class and its file stay as they are.
    """
    forward: Any = kind.forward
    code, seen = getattr(forward, "__code__", None), getattr(forward, "__globals__", {})
    theirs = seen.get(NAME)
    if not kind.__module__.startswith("transformers.") or code is None or NAME not in code.co_names or theirs is None:
        return None
    if not _same(theirs):
        return None
    names = {**seen, NAME: _instead_of(theirs)}
    copied = FunctionType(code, names, forward.__name__, forward.__defaults__, forward.__closure__)
    copied.__kwdefaults__ = forward.__kwdefaults__
    return copied


def _instead_of(theirs: Callable[..., Any]) -> Callable[..., Any]:
    def turned(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> Any:
        alike = q.dtype == k.dtype == cos.dtype and q.shape[-1] == cos.shape[-1]
        if q.device.type != "cpu" or not alike or torch.compiler.is_compiling():
            return theirs(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)
        cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
        return rotate(q, cos, sin), rotate(k, cos, sin)

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
