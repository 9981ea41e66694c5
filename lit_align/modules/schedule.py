"""Learning-rate schedules as a factor of (optimizer step, total optimizer steps)."""

from __future__ import annotations

import math


class Schedule:
    """Base class: a linear warm-up, and after it whatever the subclass says.

    Args:
        warmup: optimizer steps of warm-up; below 1, a share of all steps.
        floor: factor at the end.
    """

    def __init__(self, warmup: float = 0.0, floor: float = 0.0) -> None:
        if warmup < 0 or not 0 <= floor <= 1:
            raise ValueError(f"warmup must not be negative and floor must be in [0, 1], got {warmup} and {floor}")
        self.warmup = warmup
        self.floor = floor

    def factor(self, step: int, total: int) -> float:
        """What to multiply the learning rate of optimizer step `step` (from 0) of `total` with."""
        warmup = self.warmup if self.warmup >= 1 else self.warmup * total
        if step < warmup:
            return (step + 1) / (warmup + 1)
        progress = min((step - warmup) / max(total - warmup, 1), 1.0)
        return self.floor + (1.0 - self.floor) * self.decay(progress)

    def decay(self, progress: float) -> float:
        """From 1 to 0 as progress after the warm-up goes from 0 to 1."""
        raise NotImplementedError


class Constant(Schedule):
    """Stay at the full rate."""

    def decay(self, progress: float) -> float:
        """1."""
        return 1.0


class Linear(Schedule):
    """Fall linearly."""

    def decay(self, progress: float) -> float:
        """1 - progress."""
        return 1.0 - progress


class Cosine(Schedule):
    """Fall along half a cosine (Loshchilov and Hutter 2017)."""

    def decay(self, progress: float) -> float:
        """(1 + cos(pi progress)) / 2."""
        return 0.5 * (1.0 + math.cos(math.pi * progress))
