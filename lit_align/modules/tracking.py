"""What every method logs of its way: learning rate, norm of the gradient, tokens."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lit_align.types import PackedBatch


class TokensSeen:
    """Tokens that training has seen, from its first step on; a resumed run counts on.

    `processed` are those that a forward computes: a prompt that several answers share counts once, padding does not
    count, nor does a second pass over the same answers. `scored` are those that the loss is about.

    Attributes:
        names: metrics, in the order of `totals`.
        totals: of all ranks, up to the last optimizer step (PPO: iteration).
    """

    names = ("tokens", "tokens_scored")

    def __init__(self) -> None:
        self.totals = [0.0, 0.0]
        self._latest: list[tuple[Tensor, int]] = []

    def add(self, batch: PackedBatch) -> None:
        """Note a micro-batch. What is on a device stays there until the step reads it with the loss."""
        self._latest.append(((batch.tree_RN >= 0).sum(), batch.num_scored))

    def latest(self) -> list[Tensor | float]:
        """This rank's counts since the last step, to be summed over ranks. The next step begins from zero."""
        processed, scored = [count for count, _ in self._latest], sum(count for _, count in self._latest)
        self._latest = []
        return [torch.stack(processed).sum() if processed else 0.0, float(scored)]

    def settle(self, latest: Iterable[Tensor | float]) -> dict[str, Tensor]:
        """Add a step's counts over all ranks; returns the totals by name."""
        self.totals = [before + float(count) for before, count in zip(self.totals, latest, strict=True)]
        return {
            name: torch.tensor(total, dtype=torch.float64) for name, total in zip(self.names, self.totals, strict=True)
        }


def learning_rate(optimizer: Any) -> Tensor:
    """Of the optimizer's first group of parameters, in this step."""
    return torch.as_tensor(optimizer.param_groups[0]["lr"], dtype=torch.float64)


def gradient_norm(parameters: Iterable[Tensor]) -> Tensor:
    """Norm of all gradients together; a DTensor where they are slices. It waits for nothing."""
    return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])


def whole_norm(norm: Tensor) -> Tensor:
    """A norm as a tensor of its own: of slices, over all of them."""
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def on_host(values: Iterable[Tensor | float]) -> list[Tensor | float]:
    """Scalars with those of a GPU in one transfer: each by itself would wait for the device."""
    given = list(values)
    there = [value for value in given if isinstance(value, Tensor) and value.is_cuda]
    moved = iter(torch.stack([value.double() for value in there]).cpu() if there else ())
    return [next(moved) if isinstance(value, Tensor) and value.is_cuda else value for value in given]
