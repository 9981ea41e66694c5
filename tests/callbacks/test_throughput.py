"""Tokens a second, and the one epoch that a run takes where no end is set: through the command line."""

from __future__ import annotations

import csv
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from support.configs import config
from support.parsers import only
from support.runs import write_rows
from support.tiny import tiny_folder

from lit_align.callbacks import Throughput
from lit_align.cli.entry import main


def fitted(place: Path, **trainer: Any) -> Path:
    write_rows(place)
    content = config("sft", tiny_folder(place / "model"), place, place / "run", **trainer)
    (place / "run.yaml").write_text(yaml.safe_dump(content))
    main(["fit", "-c", str(place / "run.yaml")])
    return place / "run"


def test_one_epoch_where_no_end_is_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    only("fit", monkeypatch)
    run = fitted(tmp_path)
    assert "neither trainer.max_epochs nor trainer.max_steps is set: the run takes 1 epoch" in capsys.readouterr().out
    assert yaml.safe_load((run / "config.yaml").read_text())["trainer"]["max_epochs"] == 1
    rows = list(csv.DictReader((run / "metrics.csv").read_text().splitlines()))
    steps = [row for row in rows if row["train/loss"]]
    assert len(steps) == 4
    for name in ("tokens_per_second", "tokens", "grad_norm", "learning_rate", "token_accuracy"):
        assert all(float(row[f"train/{name}"]) >= 0 for row in steps), name
    assert all(float(row["train/tokens_per_second"]) > 0 for row in steps)
    # What a clock decides is no measure of the model.
    card = (run / "model" / "README.md").read_text()
    assert "train/grad_norm" in card
    assert "tokens_per_second" not in card


def test_an_end_that_is_set_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    only("fit", monkeypatch)
    run = fitted(tmp_path, max_steps=6)
    assert "1 epoch" not in capsys.readouterr().out
    assert yaml.safe_load((run / "config.yaml").read_text())["trainer"]["max_epochs"] is None
    assert (
        len([row for row in csv.DictReader((run / "metrics.csv").read_text().splitlines()) if row["train/loss"]]) == 6
    )


def test_validation_takes_no_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 2.0, 102.0, 104.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    rates: list[float] = []
    seen = SimpleNamespace(totals=[50.0, 0.0])
    module: Any = SimpleNamespace(tokens_seen=seen, log=lambda _, rate: rates.append(rate))
    callback, trainer = Throughput(), SimpleNamespace()
    callback.on_train_start(trainer, module)  # type: ignore[arg-type]
    for total in (150.0, 350.0):
        callback.on_train_batch_start(trainer)  # type: ignore[arg-type]
        seen.totals[0] = total
        callback.on_train_batch_end(trainer, module)  # type: ignore[arg-type]
        callback.on_validation_start(trainer, module)  # type: ignore[arg-type]
    assert rates == [50.0, 100.0]
