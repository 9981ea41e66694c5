"""`pipeline`, `demo` and `report` as commands; the demo end to end, and killed on its way."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.metrics import steady
from support.page import addresses

import lit_align
from lit_align.cli.commands import experiments
from lit_align.cli.entry import main
from lit_align.config.errors import ConfigError

WRITE = "support.steps.Write"


@pytest.fixture
def stage(tmp_path: Path) -> Callable[[Any], list[str]]:
    """The command line of a pipeline with one stage."""

    def written(content: Any) -> list[str]:
        (tmp_path / "one.yaml").write_text(yaml.safe_dump(content))
        content = {"root": "runs/one", "stages": {"one": {"call": "one.yaml"}}, "quick": {"one": {"init_args.seed": 7}}}
        (tmp_path / "pipeline.yaml").write_text(yaml.safe_dump(content))
        return ["pipeline", str(tmp_path / "pipeline.yaml"), "--out", str(tmp_path / "out")]

    return written


def test_a_pipeline_with_its_options(
    stage: Callable, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = stage({"class_path": WRITE, "init_args": {"words": ["a", "b"], "seed": 1}})
    text = tmp_path / "out" / "one" / "text.txt"
    summary = main([*args, "--seed", "3", "--set", "one.init_args.words.0=c", "--set", 'one.init_args.words.1="3"'])
    # Values are JSON; what is no JSON is text.
    assert text.read_text() == "c 3 4"
    assert summary == json.loads((tmp_path / "out" / "summary.json").read_text())
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["seed"] == 3
    assert f"page in {tmp_path / 'out' / 'report.html'}" in capsys.readouterr().out
    main([*args, "--quick", "--set", 'one.init_args.words=["x", "y"]', "--set", "one.init_args.words.1=y=z"])
    assert text.read_text() == "x y=z 7"
    # Without --out, into the root.
    monkeypatch.chdir(tmp_path)
    main(args[:2])
    assert (tmp_path / "runs" / "one" / "one" / "text.txt").read_text() == "a b 1"


WRONG = [
    ({"class_path": WRITE, "init_args": {"words": ["a"], "sed": 1}}, "unknown key 'step.sed', did you mean 'seed'?"),
    ({"class_path": WRITE, "init_args": {"words": 3}}, "step.words: expected list, got 3"),
    ({"class_path": WRITE}, "step: missing words"),
    ({"class_path": WRITE, "init_args": {"words": []}}, "words must not be empty"),
    ({"class_path": "support.steps.Writ"}, "step: no class or function 'Writ'; give a full import path"),
    ({"class_path": "support.steps.NoStep"}, "step: Import path support.steps.NoStep does not implement protocol Step"),
    ({"init_args": {"words": ["a"]}}, "step: expected a Step, by class_path and init_args or by its own keys, got {'"),
]


@pytest.mark.parametrize(("content", "line"), WRONG, ids=lambda value: str(value)[:50])
def test_a_mistake_in_a_step(stage: Callable, tmp_path: Path, content: Any, line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        main(stage(content))
    assert str(caught.value).startswith(f"{tmp_path / 'out' / 'one' / 'stage.yaml'}: {line}")
    assert "\n" not in str(caught.value)


def test_an_error_of_the_step_itself_is_not_explained_away(stage: Callable, tmp_path: Path) -> None:
    breaks = {"class_path": WRITE, "init_args": {"words": ["a"], "breaks_at": str(tmp_path / "flag")}}
    with pytest.raises(RuntimeError, match="interrupted"):
        main(stage(breaks))


def test_report_of_a_folder(stage: Callable, tmp_path: Path) -> None:
    main(stage({"class_path": WRITE, "init_args": {"words": ["a"]}}))
    page = tmp_path / "out" / "report.html"
    page.unlink()
    assert main(["report", str(tmp_path / "out")]) == page
    assert "lit_align: out" in page.read_text()


def test_where_the_experiments_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (experiments() / "sandbox" / "pipeline.yaml").exists()
    # Installed, they lie inside the package.
    package = tmp_path / "site-packages" / "lit_align"
    monkeypatch.setattr(lit_align, "__file__", str(package / "__init__.py"))
    assert experiments() == package / "experiments"


def test_help_of_a_command(capsys: pytest.CaptureFixture) -> None:
    for command in ("demo", "pipeline", "sweep", "report"):
        with pytest.raises(SystemExit) as ended:
            main([command, "--help"])
        assert not ended.value.code
        assert f"usage: lit-align {command}" in capsys.readouterr().out


# The demo.

STAGES = 12
FIGURES = [
    *(f"{policy}/{name}" for policy in ("base", "sft", "ppo", "dpo") for name in ("gold_reward", "length", "ece")),
    *("reward/accuracy", "reward/gold_accuracy", "ppo/kl", "dpo/kl", "seconds"),
    *(f"{stage}/seconds" for stage in ("pretrain", "sft", "reward", "ppo", "dpo")),
]


def figures(summary: dict[str, float]) -> dict[str, float]:
    """Those that do not depend on the clock."""
    return {name: value for name, value in summary.items() if "seconds" not in name}


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, float], Path]:
    """A trial of the demo, uninterrupted."""
    out = tmp_path_factory.mktemp("demo") / "demo"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIT_ALIGN_CACHE", str(out.parent / "cache"))
        return main(["demo", "--quick", "--out", str(out)]), out


@pytest.mark.slow
def test_the_demo_leaves_what_it_promises(demo: tuple[dict[str, float], Path]) -> None:
    summary, out = demo
    assert set(FIGURES) <= set(summary)
    assert json.loads((out / "summary.json").read_text()) == summary
    assert summary["sft/kl"] == 0
    for name in ("pretrain", "sft", "reward", "ppo", "dpo"):
        for file in ("config.yaml", "metrics.csv", "manifest.json", "model/model.safetensors"):
            assert (out / name / file).exists(), f"{name}/{file}"
    assert len(json.loads((out / "manifest.json").read_text())["stages"]) == STAGES


@pytest.mark.slow
def test_the_demos_page_fetches_nothing(demo: tuple[dict[str, float], Path]) -> None:
    page = (demo[1] / "report.html").read_text()
    assert page.count("<svg") >= 5
    assert all(address.startswith("#") for address in addresses(page))


@pytest.mark.slow
def test_the_demo_does_nothing_twice(demo: tuple[dict[str, float], Path], capsys: pytest.CaptureFixture) -> None:
    summary, out = demo
    models = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    again = main(["demo", "--quick", "--out", str(out)])
    assert capsys.readouterr().out.count("done before") == STAGES
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")} == models
    assert figures(again) == figures(summary)


@pytest.mark.slow
def test_the_demo_killed_on_its_way_ends_as_if_it_had_not_been(
    demo: tuple[dict[str, float], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIT_ALIGN_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "killed"
    args = ["demo", "--quick", "--out", str(out)]
    package = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([package, os.environ.get("PYTHONPATH", "")])}
    for name in ("pretrain", "ppo"):
        # In the middle of a fit, as soon as there is something to go on from.
        process = subprocess.Popen(
            [sys.executable, "-m", "lit_align", *args],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        began = time.monotonic()
        while not (out / name / "checkpoints" / "last.ckpt").exists():
            assert process.poll() is None
            assert time.monotonic() - began < 500
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (out / name / "done.json").exists()
    begun = json.loads((out / "ppo" / "stage.json").read_text())
    summary = main(args)
    assert figures(summary) == figures(demo[0])
    # It was one stage that went on, not another one that began.
    assert not (out / "replaced").exists()
    assert not list(out.glob("*-2"))
    assert json.loads((out / "ppo" / "stage.json").read_text())["key"] == begun["key"]
    whole, broken = (steady(folder / "ppo" / "metrics.csv") for folder in (demo[1], out))
    assert whole == broken
