"""Metrics as one csv file in the run's folder, continued when the run is."""

from __future__ import annotations

import csv
import os
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.utilities import rank_zero_only


class MetricsCSV(CSVLogger):
    """Lightning's csv logger without its version folders, and without its deleting the metrics of a resumed run.

    Args:
        folder: the run's folder; metrics go to `metrics.csv` in it.
        flush_logs_every_n_steps: how many optimizer steps at most are lost when the process is killed.
    """

    _experiment: _ContinuingWriter | None

    def __init__(self, folder: str | Path, flush_logs_every_n_steps: int = 10) -> None:
        super().__init__(os.fspath(folder), name="", version="", flush_logs_every_n_steps=flush_logs_every_n_steps)

    @property
    def experiment(self) -> Any:
        """The writer; Lightning calls this on the first process only."""
        if self._experiment is None:
            self._experiment = _ContinuingWriter(log_dir=self.log_dir)
        return self._experiment

    @rank_zero_only
    def log_hyperparams(self, params: Any = None) -> None:
        """The configuration has a file of its own."""


class _ContinuingWriter(ExperimentWriter):
    """Appends; the first row decides which rows of an interrupted run stay: those of earlier steps."""

    def _check_log_dir_exists(self) -> None:
        # Lightning's deletes the file here.
        self.interrupted = Path(self.metrics_file_path).exists()

    def log_metrics(self, metrics_dict: dict[str, Any], step: int | None = None) -> None:
        """Record a row."""
        if self.interrupted and step is not None:
            self.interrupted = False
            self._keep_before(step)
        super().log_metrics(metrics_dict, step)

    def _keep_before(self, step: int) -> None:
        path = Path(self.metrics_file_path)
        with path.open(newline="") as file:
            reader = csv.DictReader(file)
            self.metrics_keys = list(reader.fieldnames or [])
            # A killed process may have left half a line behind.
            kept = [row for row in reader if (row.get("step") or "").isdigit() and int(row["step"]) < step]
        partial = path.with_suffix(".partial")
        with partial.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=self.metrics_keys)
            writer.writeheader()
            writer.writerows(kept)
        partial.replace(path)


def last_values(metrics: Path) -> dict[str, float]:
    """The last value of each metric of a run."""
    if not metrics.exists():
        return {}
    values: dict[str, float] = {}
    with metrics.open(newline="") as file:
        for row in csv.DictReader(file):
            values |= {name: float(value) for name, value in row.items() if value}
    return values
