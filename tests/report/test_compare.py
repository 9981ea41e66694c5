"""Runs over each other, points, runs that have not ended, and text of theirs that is no markup."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.page import Page

from lit_align.cli.entry import main
from lit_align.config.errors import ConfigError
from lit_align.report import write_comparison, write_report
from lit_align.report.figures import curves
from lit_align.report.several import flat, labels

EVIL = "<i>$a&b\x1b[2J"


def run(folder: Path, rate: float, losses: list[float], ended: bool = True, said: str = "hello") -> Path:
    folder.mkdir(parents=True)
    model: dict[str, Any] = {
        "class_path": "lit_align.SFTModule",
        "init_args": {"optimizer": {"init_args": {"lr": rate}}},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump({"model": model, "out": str(folder), "seed_everything": 0}))
    rows = [f"0,{step},{loss}," for step, loss in enumerate(losses)]
    (folder / "metrics.csv").write_text(
        "\n".join(["epoch,step,train/loss,val/loss", *rows, f"0,{len(losses)},,0.75"]) + "\n"
    )
    lines = [{"step": 1, "prompt": "say", "answer": said, "finished": True}]
    (folder / "said.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if ended:
        (folder / "model").mkdir()
    return folder


def texts(path: Path) -> list[str]:
    return [text.strip() for text in Page(path.read_text(encoding="utf-8")).texts if text.strip()]


def test_two_runs_on_one_page(tmp_path: Path) -> None:
    folders = [run(tmp_path / "a", 1e-4, [3.0, 2.0, 1.0]), run(tmp_path / "b", 1e-3, [3.0, 2.5], said="bye")]
    page = write_comparison(folders, tmp_path / "page.html")
    shown = texts(page)

    def row(first: str, columns: int = 3) -> list[str]:
        at = shown.index(first)
        return shown[at : at + columns]

    assert row("model.optimizer.lr") == ["model.optimizer.lr", "0.0001", "0.001"]
    assert "seed_everything" not in shown  # it is the same in both
    assert row("train/loss") == ["train/loss", "1", "2.5"]
    assert row("val/loss") == ["val/loss", "0.75", "0.75"]
    assert row("say") == ["say", "hello", "bye"]
    assert Page(page.read_text()).tags.count("svg") == 1
    assert {"training loss (nats)", "held-out loss (nats)"} <= set(shown)
    assert page.read_text() == write_comparison(folders, tmp_path / "page.html").read_text()


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    one, other = run(tmp_path / "x" / "sft", 1e-4, [3.0]), run(tmp_path / "y" / "sft", 1e-3, [3.0])
    assert main(["report", str(one), str(other)]) == Path("comparison.html")
    assert "page in comparison.html" in capsys.readouterr().out
    assert {"x/sft", "y/sft"} <= set(texts(tmp_path / "comparison.html"))
    assert main(["report", str(one)]) == one / "report.html"
    with pytest.raises((ValueError, ConfigError), match="nowhere is not a folder"):
        main(["report", str(one), str(tmp_path / "nowhere")])
    (tmp_path / "empty").mkdir()
    with pytest.raises((ValueError, ConfigError), match="empty holds no run"):
        main(["report", str(one), str(tmp_path / "empty")])


def test_one_point_is_a_point() -> None:
    svg = curves("sft", {"val/loss": ([4.0], [1.0])})
    assert svg is not None
    assert re.search(r'<use xlink:href="#m\w+" x="[\d.]+" y="[\d.]+" style="fill: #0072b2', svg)


def test_a_run_that_has_not_ended_says_so(tmp_path: Path) -> None:
    torn = run(tmp_path / "torn", 1e-4, [3.0, 2.0], ended=False)
    with (torn / "metrics.csv").open("a") as file:
        file.write("0,3,1.2e")
    assert any("has not ended: it is still going, or has failed; 2 steps" in text for text in texts(write_report(torn)))
    started = tmp_path / "started"
    started.mkdir()
    (started / "config.yaml").write_text("out: started\n")
    assert any("has logged no step yet" in text for text in texts(write_report(started)))
    both = texts(write_comparison([torn, started, run(tmp_path / "whole", 1e-4, [3.0])], tmp_path / "page.html"))
    assert any(text.startswith("torn: has not ended") for text in both)
    assert "ended" in both
    stage = tmp_path / "pipeline" / "sft"
    stage.mkdir(parents=True)
    (stage / "stage.json").write_text("{}")
    (stage / "metrics.csv").write_text("epoch,step,train/loss\n0,0,2.0\n")
    assert any("stage sft has not ended" in text for text in texts(write_report(stage.parent)))


def test_text_of_runs_is_text(tmp_path: Path) -> None:
    folders = [run(tmp_path / "<i>$a&b", 1e-4, [3.0], said=EVIL), run(tmp_path / "b$", 1e-3, [2.0], said=EVIL)]
    page = write_comparison(folders, tmp_path / "page.html")
    parsed = Page(page.read_text(encoding="utf-8"))
    assert "i" not in parsed.tags
    assert "\x1b" not in page.read_text()
    assert all(address.startswith("#") for address in parsed.addresses)
    assert texts(page).count("<i>$a&b") >= 2


def test_names_and_settings() -> None:
    assert labels([Path("/r/a/sft"), Path("/r/b/sft")]) == ["a/sft", "b/sft"]
    assert labels([Path("/r/a"), Path("/r/b")]) == ["a", "b"]
    told = {"out": "x", "model": {"class_path": "M", "init_args": {"lr": 1}}, "data": {"train": [{"path": "p"}]}}
    assert flat(told) == {"model.class_path": "M", "model.lr": "1", "data.train.0.path": "p"}
