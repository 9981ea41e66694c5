"""Progress: a bar where somebody watches, a line now and then where the output goes to a file."""

from __future__ import annotations

import sys
import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar

from lit_align.utils.display import say


class ProgressLines(ProgressBar):
    """Prints a line every few seconds: step, the metrics of the bar, time to go.

    Args:
        every: seconds between lines.
    """

    def __init__(self, every: float = 10.0) -> None:
        super().__init__()
        self.every = every
        self._start = self._last = 0.0
        self._first_batch = 0

    def enable(self) -> None:
        """Lines disturb nobody: they are always on."""

    def disable(self) -> None:
        """Lightning silences all processes but the first in this way; `is_global_zero` does it here."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._start = self._last = time.monotonic()
        self._first_batch = trainer.fit_loop.total_batch_idx + 1

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """A line, if it is time for one."""
        now = time.monotonic()
        if now - self._last < self.every or not trainer.is_global_zero:
            return
        self._last = now
        done, total = trainer.fit_loop.total_batch_idx + 1, self._total_batches(trainer)
        left = (now - self._start) / max(done - self._first_batch, 1) * (total - done)
        metrics = "  ".join(
            f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
            for name, value in self.get_metrics(trainer, pl_module).items()
        )
        say(f"  batch {done}/{total:.0f}  {metrics}  {duration(left)} left")

    @staticmethod
    def _total_batches(trainer: Trainer) -> float:
        epochs = trainer.max_epochs if trainer.max_epochs and trainer.max_epochs > 0 else float("inf")
        by_epochs = epochs * trainer.num_training_batches
        per_batch = getattr(trainer.lightning_module, "optimizer_steps_per_batch", 1) / trainer.accumulate_grad_batches
        by_steps = trainer.max_steps / per_batch if trainer.max_steps >= 0 else float("inf")
        return min(by_epochs, by_steps)


def duration(seconds: float) -> str:
    """Seconds, or the two largest units that suit: 45 s, 12 min, 3 h 20 min, 2 d 4 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds == float("inf"):
        return "no known time"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min"
    return f"{hours // 24} d {hours % 24} h"


def progress() -> Callback:
    """The one that suits where standard output goes."""
    return RichProgressBar(leave=True) if sys.stdout.isatty() else ProgressLines()
