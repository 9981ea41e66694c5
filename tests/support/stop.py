"""A callback that ends a fit with an error, as an interruption that this process survives."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class StopAt(Callback):
    """Raise when a batch has been trained on.

    Args:
        batch: which, from 1.
    """

    def __init__(self, batch: int) -> None:
        self.batch = batch

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Raise."""
        if trainer.fit_loop.total_batch_idx + 1 == self.batch:
            raise RuntimeError("stopped")
