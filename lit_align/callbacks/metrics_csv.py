"""Metrics as one csv file in the run's folder, continued when the run is."""

from __future__ import annotations

import csv
import os
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.utilities import rank_zero_only

from lit_align.utils.disk import replacing


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


def log_ahead(trainer: Trainer) -> None:
    """Write what the batch logged before a checkpoint counts the batch as done.

    Lightning logs a batch after its callbacks: a run killed between the two would go on without that row.
    """
    connector = trainer._logger_connector
    accumulating = trainer.fit_loop._should_accumulate() and trainer.lightning_module.automatic_optimization
    if accumulating or not connector.should_update_logs:
        return
    row: dict[str, Any] = {"epoch": trainer.current_epoch, **connector.metrics["log"]}
    for logger in trainer.loggers:
        if isinstance(logger, MetricsCSV):
            logger.log_metrics(row, trainer.fit_loop.epoch_loop._batches_that_stepped)
            logger.save()


class _ContinuingWriter(ExperimentWriter):
    """Appends; the first row decides which rows of an interrupted run stay: those of earlier steps."""

    def __init__(self, log_dir: str) -> None:
        super().__init__(log_dir)
        self.latest: dict[str, Any] = {}

    def _check_log_dir_exists(self) -> None:
        # Lightning's deletes the file here.
        self.interrupted = Path(self.metrics_file_path).exists()

    def log_metrics(self, metrics_dict: dict[str, Any], step: int | None = None) -> None:
        """Record a row; one that was logged ahead comes a second time."""
        if self.interrupted and step is not None:
            self.interrupted = False
            self._keep_before(step)
        super().log_metrics(metrics_dict, step)
        if repr(sorted(self.metrics[-1].items())) == repr(sorted(self.latest.items())):  # by repr, for nan is not nan
            self.metrics.pop()
        else:
            self.latest = self.metrics[-1]

    def save(self) -> None:
        """Append; a column that is new needs the file written anew."""
        path = Path(self.metrics_file_path)
        if not self.metrics:
            return
        try:
            if self._record_new_keys() or not path.exists():
                self._write(_rows(path) + self.metrics)
            else:
                with path.open("a", newline="") as file:
                    csv.DictWriter(file, fieldnames=self.metrics_keys).writerows(self.metrics)
        except OSError as error:
            raise OSError(error.errno, f"{error.strerror}: metrics cannot be written", str(path)) from error
        self.metrics = []

    def _keep_before(self, step: int) -> None:
        rows = _rows(Path(self.metrics_file_path))
        self.metrics_keys = sorted(set().union(*rows))
        self._write([row for row in rows if (row.get("step") or "").isdigit() and int(row["step"]) < step])

    def _write(self, rows: list[dict[str, Any]]) -> None:
        """The file with these rows, there whole or as it was."""
        with replacing(Path(self.metrics_file_path)) as partial, partial.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=self.metrics_keys)
            writer.writeheader()
            writer.writerows(rows)


def last_values(metrics: Path, until: int | None = None) -> dict[str, float]:
    """The last value of each metric of a run; with `until`, up to that `step` of the file."""
    if not metrics.exists():
        return {}
    values: dict[str, float] = {}
    with metrics.open(newline="") as file:
        for row in csv.DictReader(file):
            if until is not None and float(row.get("step") or 0) > until:
                break
            values |= {name: float(value) for name, value in row.items() if value}
    return values


def _rows(path: Path) -> list[dict[str, Any]]:
    """Rows of the file, if there is one, without half a line that a killed process left: its step may be half, too."""
    if not path.exists():
        return []
    lines = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    return list(csv.DictReader(lines))
