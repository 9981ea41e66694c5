"""Kernels of others give the log-probabilities and gradients of the head of this house."""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch
from torch import Tensor

from lit_align.functional.fused_heads import liger_logprobs, torch_logprobs
from lit_align.functional.head import linear_logprobs

S, H, V = 37, 8, 301
HAS_LIGER = bool(importlib.util.find_spec("liger_kernel") and importlib.util.find_spec("triton"))
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# On a CPU: `TRITON_INTERPRET=1 pytest tests/functional/test_fused_heads.py`, with the extra `liger`.
needs_liger = pytest.mark.skipif(
    not HAS_LIGER or not (INTERPRETED or torch.cuda.is_available()), reason="Liger, and a GPU or Triton's interpreter"
)
needs_torch = pytest.mark.skipif(not hasattr(torch.nn, "LinearCrossEntropyOptions"), reason="torch 2.13")


def inputs(dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    seeded = torch.Generator().manual_seed(0)
    hidden = torch.randn(S, H, generator=seeded, dtype=torch.float64)
    weight = torch.randn(V, H, generator=seeded, dtype=torch.float64)
    target = torch.randint(0, V, (S,), generator=seeded)
    return *(x.to(device, dtype).requires_grad_() for x in (hidden, weight)), target.to(device)  # type: ignore[return-value]


def gradients(logps: Tensor, hidden: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    """Of a loss that weighs every token differently, some not at all."""
    weights = torch.arange(S, device=logps.device) % 7 - 2.0
    return torch.autograd.grad((logps * weights).sum(), (hidden, weight))


# Kills: the gradient of a plain sum; the sign; temperature left out, or of the gradients.
@needs_torch
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_torchs_head_is_the_head(temperature: float) -> None:
    hidden, weight, target = inputs(torch.float64)
    expected, _ = linear_logprobs(hidden, weight, target, temperature)
    got = torch_logprobs(hidden, weight, target, temperature)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-13)
    torch.testing.assert_close(gradients(got, hidden, weight), gradients(expected, hidden, weight), rtol=0, atol=1e-12)
    with torch.inference_mode():
        torch.testing.assert_close(torch_logprobs(hidden, weight, target, temperature), expected, rtol=0, atol=1e-13)


# Kills: the gradient of a plain sum; the sign; temperature left out; losses in the type of the states.
@needs_liger
@pytest.mark.parametrize(("dtype", "temperature"), [(torch.float32, 1.0), (torch.float32, 0.6), (torch.bfloat16, 1.0)])
def test_ligers_head_is_the_head(dtype: torch.dtype, temperature: float) -> None:
    hidden, weight, target = inputs(dtype, "cpu" if INTERPRETED else "cuda")
    expected, _ = linear_logprobs(hidden, weight, target, temperature)
    got = liger_logprobs(hidden, weight, target, temperature)
    assert got.dtype == torch.float32
    exact = dtype == torch.float32
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5 if exact else 1e-3)
    for ours, theirs in zip(gradients(expected, hidden, weight), gradients(got, hidden, weight), strict=True):
        assert (ours - theirs).abs().max() <= (1e-5 if exact else 2e-2) * ours.abs().max()
    with torch.no_grad():
        torch.testing.assert_close(liger_logprobs(hidden, weight, target, temperature), got)
