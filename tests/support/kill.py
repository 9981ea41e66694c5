"""A callback that ends the process as the out-of-memory killer would."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class KillAfter(Callback):
    """Kill -9 when a batch has been trained on.

    Args:
        batch: which, from 1.
        once: a file that says it has been done, and not to do it again.
    """

    def __init__(self, batch: int, once: str | None = None) -> None:
        self.batch = batch
        self.once = once

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """No goodbye, no flushing."""
        if trainer.fit_loop.total_batch_idx + 1 == self.batch:
            if self.once is not None:
                if Path(self.once).exists():
                    return
                Path(self.once).touch()
            os.kill(os.getpid(), signal.SIGKILL)
