"""Metrics as one csv file in the run's folder, continued when the run is."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from lit_align.utils.disk import replacing


class MetricsCSV(Logger):
    """Logs metrics to one file, on the first process; a resumed run goes on in it.

    The first row decides which rows of an interrupted run stay: those of earlier steps.

    Args:
        folder: the run's folder; metrics go to `metrics.csv` in it.
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__()
        self.path = Path(folder) / "metrics.csv"
        self.columns: list[str] = []
        self.latest: dict[str, Any] = {}
        self.rows: list[dict[str, Any]] = []  # to be written
        self.interrupted: bool | None = None  # whether there are rows of an earlier process; None before the first row

    @property
    def name(self) -> str:
        """Empty, as is `version`: the folder is one run's."""
        return ""

    @property
    def version(self) -> str:
        """Empty."""
        return ""

    @property
    def save_dir(self) -> str:
        """The run's folder."""
        return str(self.path.parent)

    @property
    def log_dir(self) -> str:
        """The run's folder."""
        return self.save_dir

    @rank_zero_only
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """No-op: the configuration has a file of its own."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Record a row. One that repeats the last, as after `log_ahead`, is left out."""
        if self.interrupted is None:
            self.interrupted = self.path.exists()
        if self.interrupted and step is not None:
            self.interrupted = False
            self._keep_before(step)
        row = {name: value.item() if isinstance(value, Tensor) else value for name, value in metrics.items()}
        row["step"] = len(self.rows) if step is None else step
        if repr(sorted(row.items())) != repr(sorted(self.latest.items())):  # by repr, as nan is not nan
            self.rows.append(row)
            self.latest = row

    @rank_zero_only
    def save(self) -> None:
        """Append; a new column needs the file written anew. Lightning calls this after each row."""
        if not self.rows:
            return
        found = set().union(*self.rows)
        new = not found <= set(self.columns)
        self.columns = sorted(found.union(self.columns))
        try:
            if new or not self.path.exists():
                self._write(_rows(self.path) + self.rows)
            else:
                with self.path.open("a", newline="") as file:
                    csv.DictWriter(file, fieldnames=self.columns).writerows(self.rows)
        except OSError as error:
            raise OSError(error.errno, f"{error.strerror}: metrics cannot be written", str(self.path)) from error
        self.rows = []

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write what is left."""
        self.save()

    def _keep_before(self, step: int) -> None:
        rows = _rows(self.path)
        self.columns = sorted(set().union(*rows))
        self._write([row for row in rows if (row.get("step") or "").isdigit() and int(row["step"]) < step])

    def _write(self, rows: list[dict[str, Any]]) -> None:
        """Write the file with these rows: it is there whole or as it was."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(self.path) as partial, partial.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=self.columns)
            writer.writeheader()
            writer.writerows(rows)


def log_ahead(trainer: Trainer) -> None:
    """Write what the batch logged before a checkpoint counts the batch as done.

    Lightning logs a batch after its callbacks: a run killed between the two would go on without that row.
    """
    # Private, because Lightning's public `logged_metrics` mixes in those of earlier steps, and nothing public tells the
    # step that its loggers count.
    connector = trainer._logger_connector
    accumulating = pending(trainer) and trainer.lightning_module.automatic_optimization
    if accumulating or not connector.should_update_logs:
        return
    row: dict[str, Any] = {"epoch": trainer.current_epoch, **connector.metrics["log"]}
    for logger in trainer.loggers:
        if isinstance(logger, MetricsCSV):
            logger.log_metrics(row, step_of_loggers(trainer))
            logger.save()


def log_now(trainer: Trainer) -> None:
    """Give all loggers what the batch logged, where the run ends before Lightning does."""
    trainer._logger_connector.update_train_step_metrics()


def step_of_loggers(trainer: Trainer) -> int:
    """The step by which loggers count: batches after which the optimizer stepped."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def pending(trainer: Trainer) -> bool:
    """Whether an accumulation is on: its gradients are in no checkpoint, and a resumed run would step without them."""
    batches = trainer.fit_loop.epoch_loop.batch_progress.current.ready
    return bool(batches % trainer.accumulate_grad_batches != 0 and not trainer.is_last_batch)


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
