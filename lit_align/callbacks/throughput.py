"""Tokens a second: of each optimizer step, without validation and checkpoints."""

from __future__ import annotations

import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

# Metrics that a clock decides: two runs of one configuration differ in these, and in no other.
TIMED = ("train/tokens_per_second",)


class Throughput(Callback):
    """Logs `train/tokens_per_second`: tokens that all processes computed, over the time since the step before.

    The data's time counts, that of validation and checkpoints does not. `AlignModule.tokens_seen` says what a token is.
    """

    def __init__(self) -> None:
        self._since: float | None = None
        self._tokens = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock, and count from what a run before has seen."""
        self._since, self._tokens = time.perf_counter(), _seen(pl_module)

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        """After validation or a checkpoint, start the clock again."""
        if self._since is None:
            self._since = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Log, if an optimizer step has ended."""
        seen, now = _seen(pl_module), time.perf_counter()
        if seen > self._tokens and self._since is not None:
            pl_module.log("train/tokens_per_second", (seen - self._tokens) / max(now - self._since, 1e-9))
            self._since, self._tokens = now, seen

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock."""
        self._since = None

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Stop the clock."""
        self._since = None


def _seen(module: Any) -> float:
    return module.tokens_seen.totals[0] if hasattr(module, "tokens_seen") else 0.0
