"""Write what `lit-align predict` says to a file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter

from lit_align.utils.disk import write_whole


class PredictionsFile(BasePredictionWriter):
    """Writes the rows that `predict_step` returns to a json lines file, whole or not at all.

    Args:
        path: the file.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__(write_interval="epoch")
        self.path = Path(path)

    def write_on_epoch_end(
        self, trainer: Trainer, pl_module: LightningModule, predictions: Sequence[Any], batch_indices: Sequence[Any]
    ) -> None:
        """Gather the rows of all processes on the first, in the order of the data, and write."""
        rows = [row for batch in predictions for row in batch]
        if trainer.world_size > 1:
            gathered: list[Any] = [None] * trainer.world_size
            torch.distributed.all_gather_object(gathered, rows)
            # Rank r had rows r, r + world, r + 2 world, ...
            longest = max(map(len, gathered))
            rows = [part[i] for i in range(longest) for part in gathered if i < len(part)]
        if trainer.is_global_zero:
            write_whole(self.path, "".join(json.dumps(row) + "\n" for row in rows))
