"""metrics.csv: one file per run, its columns as they come, continued where the run is."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

from lit_align.callbacks import MetricsCSV


def write(folder: Path, *rows: dict[str, float]) -> MetricsCSV:
    """Log rows as a run does: a step each, and `epoch` beside."""
    logger = MetricsCSV(folder)
    for row in rows:
        logger.log_metrics({"epoch": 0.0, **{k: v for k, v in row.items() if k != "step"}}, int(row["step"]))
    logger.save()
    return logger


def read(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return [{name: value for name, value in row.items() if name != "epoch"} for row in csv.DictReader(file)]


def test_the_file_lies_in_the_folder_itself(tmp_path: Path) -> None:
    logger = write(tmp_path / "run", {"step": 0, "a": 1.0})
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["metrics.csv"]
    assert Path(logger.log_dir) == tmp_path / "run"
    logger.log_hyperparams({"a": 1})
    logger.save()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["metrics.csv"]


def test_columns_that_come_later(tmp_path: Path) -> None:
    logger = write(tmp_path, {"step": 0, "b": 1.0}, {"step": 1, "b": 2.0})
    logger.log_metrics({"a": torch.tensor(0.5)}, 1)
    logger.log_metrics({"b": 3.0}, 2)
    logger.save()
    assert read(tmp_path) == [
        {"a": "", "b": "1.0", "step": "0"},
        {"a": "", "b": "2.0", "step": "1"},
        {"a": "0.5", "b": "", "step": "1"},
        {"a": "", "b": "3.0", "step": "2"},
    ]


@pytest.mark.parametrize("half", ["", "0.0,4", "0.0,4,5.", "0.0"])
def test_a_resumed_run_replaces_what_it_repeats(tmp_path: Path, half: str) -> None:
    write(tmp_path, *({"step": i, "a": float(i)} for i in range(4)))
    # A killed process may have left half a line behind.
    path = tmp_path / "metrics.csv"
    path.write_text(path.read_text() + half)
    # Resumed from the checkpoint behind step 1, with a metric that is new.
    write(tmp_path, {"step": 2, "a": 20.0}, {"step": 2, "b": 7.0}, {"step": 3, "a": 30.0})
    assert [(row["step"], row["a"], row["b"]) for row in read(tmp_path)] == [
        ("0", "0.0", ""),
        ("1", "1.0", ""),
        ("2", "20.0", ""),
        ("2", "", "7.0"),
        ("3", "30.0", ""),
    ]
    assert not list(tmp_path.glob("*.partial"))


def test_a_resumed_run_that_logs_nothing_loses_nothing(tmp_path: Path) -> None:
    write(tmp_path, {"step": 0, "a": 1.0})
    before = (tmp_path / "metrics.csv").read_bytes()
    MetricsCSV(tmp_path).save()
    MetricsCSV(tmp_path).finalize("success")
    assert (tmp_path / "metrics.csv").read_bytes() == before


def test_a_run_resumed_twice(tmp_path: Path) -> None:
    for first in (0, 2, 1):
        write(tmp_path, *({"step": i, "a": 10.0 * first + i} for i in range(first, 4)))
    assert [row["a"] for row in read(tmp_path)] == ["0.0", "11.0", "12.0", "13.0"]
