"""Learning-rate schedules as a factor of (optimizer step, total optimizer steps)."""

from __future__ import annotations

import math
from typing import Any, Literal

from lightning import Trainer


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
        begin = self.begin(warmup, total)
        if step < warmup:
            return (step + 1) / (warmup + 1)
        return self.level(min(max(step - begin, 0.0) / max(total - begin, 1), 1.0))

    def begin(self, warmup: float, total: int) -> float:
        """The optimizer step at which the decay begins: where the warm-up ends, unless the subclass says otherwise."""
        return warmup

    def level(self, progress: float) -> float:
        """From 1 to the floor as progress goes from 0 to 1."""
        return self.floor + (1.0 - self.floor) * self.decay(progress)

    def decay(self, progress: float) -> float:
        """From 1 to 0 as progress goes from 0, where the decay begins, to 1."""
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


class WSD(Schedule):
    """Warm up, stay at the full rate, decay at the end: warmup-stable-decay (Hu et al. 2024, MiniCPM, section 4).

    Its stable phase needs no known end: more steps, or several decays, start from any of its checkpoints.

    Args:
        warmup: optimizer steps of warm-up; below 1, a share of all steps.
        decay_steps: optimizer steps of the decay; below 1, a share of all steps.
        decay_type: down to the floor in a straight line, along half a cosine, or by the same factor at every step
            (MiniCPM's 0.5^(s / T), with T = -decay_steps / log2(floor)), which needs a floor above 0.
        floor: factor at the end of the decay.
    """

    def __init__(
        self,
        warmup: float = 0.0,
        decay_steps: float = 0.1,
        decay_type: Literal["linear", "cosine", "exponential"] = "linear",
        floor: float = 0.0,
    ) -> None:
        super().__init__(warmup, floor)
        if decay_steps < 0 or (warmup < 1 and decay_steps < 1 and warmup + decay_steps > 1):
            raise ValueError(
                f"warmup ({warmup}) and decay_steps ({decay_steps}) must not be negative, nor exceed 1 in all"
            )
        if decay_type == "exponential" and floor == 0:
            raise ValueError("an exponential decay never reaches 0: give a floor, such as 0.1")
        self.decay_steps = decay_steps
        self.decay_type = decay_type

    def begin(self, warmup: float, total: int) -> float:
        """So many steps before the end.

        Raises:
            ValueError: the run is too short for warm-up and decay.
        """
        length = self.decay_steps if self.decay_steps >= 1 else self.decay_steps * total
        if warmup + length > total:
            raise ValueError(
                f"{warmup:g} steps of warm-up and {length:g} of decay do not fit in {total} optimizer steps"
            )
        return total - length

    def level(self, progress: float) -> float:
        """From 1 to the floor."""
        return float(self.floor**progress) if self.decay_type == "exponential" else super().level(progress)

    def decay(self, progress: float) -> float:
        """From 1 to 0, before the floor."""
        return 1.0 - progress if self.decay_type == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))


def training_batches(trainer: Trainer) -> float:
    """Batches of an epoch on this process, `limit_train_batches` applied; infinite if the loader has no length."""
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    loader = data.train_dataloader() if data is not None else None
    try:
        batches = len(loader)  # type: ignore[arg-type]
    except TypeError:
        # A loader of `trainer.fit(module, loader)`, several loaders, or one without a length.
        trainer.fit_loop.setup_data()
        return trainer.num_training_batches
    limit = trainer.limit_train_batches
    return min(batches, limit) if isinstance(limit, int) else int(batches * limit)
