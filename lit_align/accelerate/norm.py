"""Root-mean-square normalisation in few passes, for CPUs.

transformers writes it as separate operations, and their gradients pass over tensors of the size of the states a dozen
times. Written out it takes a few, and of that size nothing is kept but its input.

Share of a training step that this saves (experiments/bench/kernels.py): sft 7.5%.

Source: Zhang and Sennrich 2019, "Root Mean Square Layer Normalization", equation 4.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Divide by the root of the mean square, and scale.

    Args:
        x: shape (..., H).
        weight: shape (H,).
        eps: added to the mean square.

    Returns:
        Like `x`.
    """
    if not torch.is_grad_enabled():
        return _normed(x, weight, eps)[0]
    normed: Tensor = _RMSNorm.apply(x, weight, eps)
    return normed


def _normed(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """With the inverse root, shape (..., 1)."""
    inverse = torch.linalg.vecdot(x, x).div_(x.shape[-1]).add_(eps).rsqrt_().unsqueeze(-1)
    return (x * weight).mul_(inverse), inverse


class _RMSNorm(torch.autograd.Function):
    """Of y = w x r, r = (mean x^2 + eps)^-1/2: dL/dx = r (w g - x r^2 mean(w g x)), of g = dL/dy.

    In place where it can be: memory that was just written is still in the cache.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        normed, inverse = _normed(x, weight, eps)
        ctx.save_for_backward(x, inverse, weight)
        return normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, inverse, weight = ctx.saved_tensors
        product = grad * x
        grad_weight = inverse.reshape(-1) @ product.reshape(-1, len(weight)) if ctx.needs_input_grad[1] else None
        if not ctx.needs_input_grad[0]:
            return None, grad_weight, None
        mean = (product @ weight).div_(len(weight)).unsqueeze(-1).mul_(inverse).mul_(inverse)
        grad_x = torch.mul(grad, weight, out=product).addcmul_(x, mean, value=-1).mul_(inverse)
        return grad_x, grad_weight, None


def put_on_norm(model: nn.Module) -> None:
    """Let the normalisation layers of this model use `rms_norm` on a CPU, each if its own forward does the same.

    The layers' class stays as it is, and so does every other model: instances of one class may differ (Gemma 4 has
    norms with and without a weight).
    """
    alike: dict[tuple[type, Any, torch.Size], bool] = {}
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm") and "forward" not in vars(module):
            weight = getattr(module, "weight", None)
            kind = type(module), _eps(module), weight.shape if isinstance(weight, Tensor) else torch.Size()
            if kind not in alike:
                alike[kind] = _same(module)
            if alike[kind]:
                # A deep copy of the model binds it to the copy, and so does pickle; a bound method is not found again.
                module.forward = partial(_forward, module)


def put_off_norm(model: nn.Module) -> None:
    """Undo `put_on_norm`."""
    for module in model.modules():
        forward = vars(module).get("forward")
        if isinstance(forward, partial) and forward.func is _forward:
            del module.forward


def _eps(module: nn.Module) -> Any:
    return getattr(module, "variance_epsilon", getattr(module, "eps", None))


def _forward(self: Any, hidden_states: Tensor, *more: Any, **options: Any) -> Any:
    """What a layer computes: `rms_norm` where it is the same in fewer passes, else its class's own forward."""
    alike = hidden_states.dtype == self.weight.dtype and hidden_states.dtype in (torch.float32, torch.float64)
    # Under autocast the product in backward would be one of bf16.
    plain = alike and not more and not options and not torch.is_autocast_enabled("cpu")
    if not plain or hidden_states.device.type != "cpu" or torch.compiler.is_compiling():
        return type(self).forward(self, hidden_states, *more, **options)
    return rms_norm(hidden_states, self.weight, _eps(self))


def _same(module: nn.Module) -> bool:
    """Whether a layer of that name does the same: some add 1 to their weights, have a gate, or no weight at all."""
    if not isinstance(_eps(module), float) or [name for name, _ in module.named_parameters()] != ["weight"]:
        return False
    seeded = torch.Generator().manual_seed(0)
    # Lightning makes models with the GPU as the place of new tensors, and in the run's precision.
    here: Any = {"generator": seeded, "device": "cpu", "dtype": torch.float32}
    size = sum(weight.numel() for weight in module.parameters())
    probe: Any = copy.deepcopy(module).to_empty(device="cpu").float()
    probe.weight = nn.Parameter(torch.randn(size, **here))
    # Large enough to tell where it is added.
    setattr(probe, "variance_epsilon" if hasattr(probe, "variance_epsilon") else "eps", 0.5)
    x = torch.randn(2, 3, size, **here)
    try:
        expected = type(module).forward(probe, x)
    except (TypeError, ValueError, RuntimeError, IndexError, AttributeError):
        return False
    return torch.allclose(expected, _forward(probe, x), atol=1e-6)
