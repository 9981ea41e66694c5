"""Draw tokens from distributions.

Share of a training step that this saves (experiments/bench/kernels.py): not measured.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 128  # tokens per block of the two-level search


def draw(probs_BV: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Draw a token from each distribution by inverting its cumulative distribution.

    This takes one random number per row; `torch.multinomial` takes one per token of the vocabulary, which was half the
    time of sampling on a CPU. The search finds a block of tokens first and then the token in it, so it sums a few
    hundred numbers per row instead of the whole vocabulary.

    Args:
        probs_BV: need not add up to 1. Shape (B, V).
        generator: on the device of `probs_BV`.

    Returns:
        Token ids, shape (B,); never a token of probability 0. A row with a NaN gives an arbitrary token, and the caller
        must check: an index out of range would end the CUDA context, and a check here would wait for the device.
    """
    # A sum of 100,000 fp32 numbers loses the fourth digit of the small ones. MPS has no float64.
    dtype = torch.float32 if probs_BV.device.type == "mps" else torch.float64
    uniform_B1 = torch.rand(len(probs_BV), 1, generator=generator, device=probs_BV.device, dtype=dtype)
    spare = -probs_BV.shape[1] % BLOCK
    # `pad` copies even if there is nothing to pad.
    padded_BV = torch.nn.functional.pad(probs_BV, (0, spare)) if spare else probs_BV
    probs_BKC = padded_BV.unflatten(1, (-1, BLOCK))
    mass_BK = probs_BKC.sum(-1).to(dtype)
    before_BK = mass_BK.cumsum(-1)
    point_B1 = _inside(uniform_B1 * before_BK[:, -1:], before_BK[:, -1:])
    block_B1 = torch.searchsorted(before_BK, point_B1, right=True).clamp(max=before_BK.shape[1] - 1)
    point_B1 = point_B1 - (before_BK - mass_BK).gather(1, block_B1)
    cumulative_BC = probs_BKC[torch.arange(len(probs_BV), device=probs_BV.device), block_B1[:, 0]].cumsum(
        -1, dtype=dtype
    )
    point_B1 = _inside(point_B1.clamp(min=0.0), cumulative_BC[:, -1:])
    token_B1 = block_B1 * BLOCK + torch.searchsorted(cumulative_BC, point_B1, right=True)
    return token_B1[:, 0].clamp(max=probs_BV.shape[1] - 1)


def _inside(point_B1: Tensor, total_B1: Tensor) -> Tensor:
    """Keep the point below the total: rounding could move it to the total, which lies behind the last token."""
    return torch.minimum(point_B1, total_B1.nextafter(torch.zeros_like(total_B1)))
