"""Progress where nobody watches: a line now and then."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch.callbacks import RichProgressBar

from lit_align.callbacks import ProgressLines, progress
from lit_align.callbacks.progress import duration


def test_a_line_for_every_batch(fit: Callable, capsys: pytest.CaptureFixture) -> None:
    fit(ProgressLines(every=0.0))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    for number, line in enumerate(lines, start=1):
        assert re.fullmatch(rf"  batch {number}/4  train/loss \d+\.?\d*  \d+ s left", line)
    assert lines[-1].endswith(" 0 s left")


def test_a_line_when_it_is_time_for_one(
    fit: Callable, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The clock is read at the start and after each batch: ten seconds are over at the third and at the fifth.
    clock: Iterator[float] = iter([0.0, 4.0, 8.0, 12.0, 16.0, 22.0, 23.0, 24.0, 25.0])
    module = sys.modules[ProgressLines.__module__]
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    fit(ProgressLines(every=10.0), max_epochs=2)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == ["3/8", "5/8"]
    # Three batches in 12 s: 20 s for the other five.
    assert [line.split()[-3:] for line in lines] == [["20", "s", "left"], ["13", "s", "left"]]


def total(**options: Any) -> float:
    values = {"max_epochs": None, "num_training_batches": 10, "accumulate_grad_batches": 1, "max_steps": -1, **options}
    module = SimpleNamespace(optimizer_steps_per_batch=values.pop("steps_per_batch", 1))
    trainer: Any = SimpleNamespace(lightning_module=module, **values)
    return ProgressLines._total_batches(trainer)


def test_how_many_batches_there_will_be() -> None:
    assert total(max_epochs=3) == 30
    assert total(max_steps=25) == 25
    assert total(max_epochs=2, max_steps=25) == 20
    assert total(max_steps=25, accumulate_grad_batches=4) == 100
    assert total(max_steps=24, steps_per_batch=8) == 3  # PPO
    assert total(max_epochs=-1) == float("inf")


def test_other_processes_are_silent(capsys: pytest.CaptureFixture) -> None:
    lines = ProgressLines(every=0.0)
    trainer: Any = SimpleNamespace(is_global_zero=False)
    lines.on_train_batch_end(trainer, None)  # type: ignore[arg-type]
    assert capsys.readouterr().out == ""


def test_a_bar_where_somebody_watches(monkeypatch: pytest.MonkeyPatch) -> None:
    for watched, kind in ((True, RichProgressBar), (False, ProgressLines)):
        monkeypatch.setattr(sys.stdout, "isatty", lambda watched=watched: watched)
        assert type(progress()) is kind


def test_hours_are_hours() -> None:
    said = {45.4: "45 s", 90: "2 min", 720: "12 min", 5369: "89 min", 5400: "1 h 30 min", 12_000: "3 h 20 min"}
    assert {seconds: duration(seconds) for seconds in said} == said
    assert duration(47.9 * 3600) == "47 h 54 min"
    assert duration(60 * 3600) == "2 d 12 h"
    assert duration(float("inf")) == "no known time"
