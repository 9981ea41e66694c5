"""`lit-align sweep`: which points a file has, what it refuses, and what running it leaves, resumed or not."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.configs import config
from support.page import Page
from support.parsers import only
from support.runs import write_rows
from support.tiny import tiny_folder

from lit_align.cli.entry import main
from lit_align.config.named_files import config_files
from lit_align.pipeline.sweep import Point, Sweep, short_names, table

LR = "model.init_args.optimizer.init_args.lr"
BETA = "model.init_args.beta"
COMMAND = ["lit-align", "fit", "${args}"]
GRID: dict[str, Any] = {
    "method": "grid",
    "metric": {"name": "val/loss"},
    "parameters": {BETA: {"values": [0.1, 0.2]}, LR: {"values": ["1e-3", 0.01]}, "seed_everything": {"value": 3}},
    "command": COMMAND,
}
RANDOM: dict[str, Any] = {**GRID, "method": "random", "run_cap": 5}

Write = Callable[[dict[str, Any]], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def written(content: dict[str, Any]) -> Path:
        file = tmp_path / "words.yaml"
        file.write_text(yaml.safe_dump(content, sort_keys=False))
        return file

    return written


def drawn(file: Path) -> list[dict[str, Any]]:
    return [point.parameters for point in Sweep(file).points]


class Runs:
    """Instead of `lit-align fit`: a metric made of the arguments, or what a point should meet with."""

    def __init__(self, **meets: Any) -> None:
        self.meets = meets
        self.args: list[list[str]] = []

    def __call__(self, args: list[str]) -> None:
        self.args.append(args)
        told = dict(arg.removeprefix("--").split("=", 1) for arg in args if "=" in arg)
        met = self.meets.get(f"at_{len(self.args)}")
        folder = Path(told["out"])
        folder.joinpath("metrics.csv").write_text(
            f"epoch,step,val/loss,val/nan\n0,1,9.0,\n0,2,{float(told[BETA]) + float(told[LR])},nan\n"
        )
        folder.joinpath("config.yaml").touch()
        if met is not None:
            raise met


def test_points_of_a_grid(write: Write) -> None:
    file = write(GRID)
    assert [tuple(point.values()) for point in drawn(file)] == [
        (0.1, "1e-3", 3),
        (0.1, 0.01, 3),
        (0.2, "1e-3", 3),
        (0.2, 0.01, 3),
    ]
    # As W&B's agent writes them.
    assert Sweep(file).points[1].args == ["fit", f"--{BETA}=0.1", f"--{LR}=0.01", "--seed_everything=3"]
    assert len(Sweep(file, count=3).points) == 3
    whole = {**GRID, "parameters": {"a": {"min": 2, "max": 4}, "b": {"value": [1, 2]}}}
    assert drawn(write(whole)) == [{"a": n, "b": [1, 2]} for n in (2, 3, 4)]
    # The same point twice is one.
    assert drawn(write({**GRID, "parameters": {"a": {"values": [1, 1, 2]}}})) == [{"a": 1}, {"a": 2}]


def test_random_points_are_the_same_every_time(write: Write) -> None:
    parameters = {"b": {"min": 0.0, "max": 1.0}, "a": {"min": 1, "max": 9}}
    told = {**RANDOM, "parameters": parameters}
    points = drawn(write(told))
    assert len(points) == 5
    assert all(list(point) == ["b", "a"] for point in points)
    assert drawn(write(told)) == points
    # More of them, or in another order, and the first are the same.
    assert drawn(write({**told, "run_cap": 9}))[:5] == points
    assert drawn(write({**told, "parameters": dict(sorted(parameters.items()))})) == points
    # Another name or seed, and they are others.
    assert drawn(write({**told, "name": "other"})) != points
    seeded = drawn(write({**told, "parameters": {**parameters, "seed_everything": {"value": 1}}}))
    assert [point["b"] for point in seeded] != [point["b"] for point in points]
    # Few values have few combinations.
    assert len(drawn(write({**told, "parameters": {"a": {"values": [1, 2]}}}))) == 2


def test_distributions(write: Write) -> None:
    parameters: dict[str, Any] = {
        "uniform": {"min": -1.0, "max": 3},
        "whole": {"min": 1, "max": 3},
        "log": {"distribution": "log_uniform_values", "min": 1.0e-6, "max": 1.0e-2},
        "exponent": {"distribution": "log_uniform", "min": -2, "max": 2},
        "normal": {"distribution": "normal", "mu": 5.0, "sigma": 0.5},
        "log_normal": {"distribution": "log_normal"},
        "steps": {"distribution": "q_uniform", "min": 0, "max": 100, "q": 8},
        "weighted": {"values": ["a", "b", "c"], "probabilities": [0.5, 0.5, 0.0]},
    }
    points = drawn(write({**RANDOM, "parameters": parameters, "run_cap": 2000}))
    columns = {key: [point[key] for point in points] for key in parameters}

    def share(key: str, below: float) -> float:
        return sum(value < below for value in columns[key]) / len(points)

    assert -1 <= min(columns["uniform"]) < -0.9
    assert 2.9 < max(columns["uniform"]) <= 3
    assert share("uniform", 1) == pytest.approx(0.5, abs=0.04)
    assert Counter(columns["whole"]).keys() == {1, 2, 3}
    assert all(isinstance(value, int) for value in columns["whole"] + columns["steps"])
    assert 1e-6 <= min(columns["log"]) <= max(columns["log"]) <= 1e-2
    assert share("log", 1e-4) == pytest.approx(0.5, abs=0.04)
    assert share("exponent", 1) == pytest.approx(0.5, abs=0.04)
    assert max(columns["exponent"]) <= 7.3891
    assert sum(columns["normal"]) / len(points) == pytest.approx(5, abs=0.04)
    assert share("normal", 4.5) == pytest.approx(0.159, abs=0.03)
    assert share("log_normal", 1) == pytest.approx(0.5, abs=0.04)
    assert set(columns["steps"]) == set(range(0, 101, 8))
    assert set(columns["weighted"]) == {"a", "b"}


def of(key: str, told: Any, **more: Any) -> dict[str, Any]:
    return {**RANDOM, "parameters": {key: told}, **more}


WRONG: list[tuple[dict[str, Any], str]] = [
    ({**GRID, "commnad": []}, "commnad is not a key of a sweep; keys are command, "),
    ({**GRID, "method": "bayes"}, "method is 'bayes': grid and random run locally, bayes with `wandb sweep`"),
    ({**GRID, "method": None}, "method is None: grid and random run locally"),
    ({**GRID, "metric": "val/loss"}, "metric.name is missing"),
    ({**GRID, "metric": {"name": "a", "goal": "max"}}, "metric.goal is 'max', expected minimize or maximize"),
    ({**GRID, "command": "lit-align fit"}, 'command must be a list of words, "${args}" one of them'),
    ({**GRID, "command": ["lit-align", "fit"]}, 'command must be a list of words, "${args}" one of them'),
    ({**GRID, "command": ["python", "train.py", "${args}"]}, "command starts 'python train.py ${args}', expected"),
    ({**GRID, "command": ["lit-align", "pipeline", "${args}"]}, "command starts 'lit-align pipeline ${args}'"),
    ({**GRID, "parameters": {}}, "parameters must be a mapping"),
    ({**RANDOM, "run_cap": None}, "run_cap is missing: random points have no end; give it, or --count"),
    ({**RANDOM, "run_cap": 0}, "run_cap is 0, expected a number of points"),
    (of("a", 3), "parameters.a must be a mapping with value, values or a distribution"),
    (of("a", {"parameters": {}}), "parameters.a nests parameters: write one dotted key for each"),
    (of("a", {"values": []}), "parameters.a.values must be a list with at least one value"),
    (of("a", {"values": [1, None]}), "parameters.a holds null, which W&B hands over as None"),
    (of("a", {"values": [1], "probabilities": [1, 2]}), "parameters.a.probabilities must be a list of 1"),
    (of("a", {"distribution": "beta"}), "parameters.a.distribution is 'beta', expected one of uniform, "),
    (of("a", {"min": 1.0}), "parameters.a.max is None, expected a number"),
    (of("a", {"min": "1e-5", "max": 1.0}), "parameters.a.min is '1e-5', expected a number (YAML reads 1e-5 as text"),
    (of("a", {"min": 2, "max": 1}), "parameters.a.min is 2, which is not below max, 1"),
    (of("a", {"min": 1.0, "max": 2, "distribution": "int_uniform"}), "parameters.a.distribution is int_uniform: min"),
    (of("a", {"min": 0, "max": 2, "distribution": "log_uniform_values"}), "parameters.a.min is 0: a logarithm needs"),
    (of("a", {"distribution": "normal", "sigma": "x"}), "parameters.a.sigma is 'x', expected a number"),
    (of("a", {"min": 0.0, "max": 1.0}, method="grid"), "parameters.a is drawn at random: a grid wants values"),
]


@pytest.mark.parametrize(("content", "line"), WRONG, ids=lambda value: str(value)[:60])
def test_a_mistake_in_a_sweep(write: Write, content: dict[str, Any], line: str) -> None:
    file = write(content)
    with pytest.raises(ValueError) as caught:
        main(["sweep", str(file), "--out", str(file.parent / "out")])
    assert str(caught.value).startswith(f"{file}: {line}")
    assert "\n" not in str(caught.value)
    assert not (file.parent / "out").exists()


def test_a_configuration_that_is_not_there(write: Write) -> None:
    command = ["${env}", "${interpreter}", "-m", "lit_align", "fit", "-c", "nowhere.yaml", "${args}"]
    with pytest.raises(ValueError, match=r"cannot read nowhere\.yaml"):
        Sweep(write({**GRID, "command": command}))


def test_weights_and_biases_is_left_out(write: Write) -> None:
    command = [
        "lit-align",
        "fit",
        "--trainer.logger=WandbLogger",
        "${args}",
        "--trainer.max_steps=4",
        "--ckpt_path=last",
    ]
    point = Sweep(write({**GRID, "command": command})).points[0]
    assert point.args == ["fit", f"--{BETA}=0.1", f"--{LR}=1e-3", "--seed_everything=3", "--trainer.max_steps=4"]


def test_running_a_sweep(write: Write, tmp_path: Path) -> None:
    runs, said = Runs(), []
    sweep = Sweep(write({**GRID, "early_terminate": {"type": "hyperband", "min_iter": 2}}), tmp_path / "out")
    result = sweep.run(runs, said.append)
    assert said[0] == "early_terminate is W&B's: here every point runs to its end"
    assert said[1] == "[1/4] beta=0.1 lr=1e-3 seed_everything=3 ..."
    assert said[2].startswith("[1/4] beta=0.1 lr=1e-3 seed_everything=3: val/loss 0.101, 0 s; at most 0 s left")
    assert result == json.loads((tmp_path / "out" / "sweep.json").read_text())
    # The last value of each, the best first.
    assert [point["metric"] for point in result["points"]] == pytest.approx([0.101, 0.11, 0.201, 0.21])
    assert result["points"][1]["parameters"] == {BETA: 0.1, LR: 0.01, "seed_everything": 3}
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["sweep"] == str(sweep.file)
    # Each in a folder of its own.
    assert all((tmp_path / "out" / point["folder"] / "metrics.csv").exists() for point in result["points"])
    assert table(result).splitlines()[1].split()[1:] == ["0.1", "1e-3", "3", "0.101", "0"]
    # Nothing is run twice.
    again = sweep.run(runs, said.append)
    assert len(runs.args) == 4
    assert again == result
    assert said[-1] == "[4/4] beta=0.2 lr=0.01 seed_everything=3: done before, val/loss 0.21"
    # A value more is that value's runs alone.
    more = {**GRID, "parameters": {**GRID["parameters"], BETA: {"values": [0.3, 0.1, 0.2]}}}
    assert len(Sweep(write(more), tmp_path / "out").run(runs, said.append)["points"]) == 6
    assert len(runs.args) == 6
    # The other way round, what is best is last.
    most = {**GRID, "metric": {"name": "val/loss", "goal": "maximize"}}
    best = Sweep(write(most), tmp_path / "out").run(runs, said.append)["points"]
    assert [point["metric"] for point in best] == pytest.approx([0.21, 0.201, 0.11, 0.101])
    assert len(runs.args) == 6


def test_a_point_that_fails_does_not_stop_the_others(write: Write, tmp_path: Path) -> None:
    runs, said = Runs(at_2=RuntimeError("out of\n luck")), []
    sweep = Sweep(write(GRID), tmp_path / "out")
    points = sweep.run(runs, said.append)["points"]
    assert len(runs.args) == 4
    assert [point["metric"] for point in points[:3]] == pytest.approx([0.101, 0.201, 0.21])
    assert (points[3]["metric"], points[3]["error"]) == (None, "RuntimeError: out of luck")
    assert any("lr=0.01 seed_everything=3: RuntimeError: out of luck, " in line for line in said)
    assert "failed" in table(sweep.run(Runs(at_1=OSError("again")), said.append))
    # It is tried again, and it alone.
    again = Runs()
    assert "error" not in sweep.run(again, said.append)["points"][3]
    assert len(again.args) == 1
    all_fail = Runs(**{f"at_{n}": ValueError("no such key") for n in range(1, 5)})
    with pytest.raises(ValueError, match="no point has ended well; the first said: ValueError: no such key"):
        Sweep(write(GRID), tmp_path / "other").run(all_fail, said.append)


def test_an_interrupted_point_goes_on_from_its_checkpoint(write: Write, tmp_path: Path) -> None:
    sweep = Sweep(write(GRID), tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        sweep.run(Runs(at_2=KeyboardInterrupt()), print)
    assert len(json.loads((tmp_path / "out" / "sweep.json").read_text())["points"]) == 1
    interrupted = tmp_path / "out" / sweep.points[1].name
    assert json.loads((interrupted / "point.json").read_text())["seconds"] >= 0
    # Without a checkpoint it begins again, in its own folder.
    left: list[bool] = []

    def first(args: list[str]) -> None:
        left.append((interrupted / "config.yaml").exists())
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sweep.run(first, print)
    assert left == [False]
    checkpoint = interrupted / "checkpoints" / "last.ckpt"
    checkpoint.parent.mkdir()
    checkpoint.touch()
    runs = Runs()
    sweep.run(runs, print)
    assert runs.args[0][-2:] == ["--ckpt_path", str(checkpoint)]
    assert not any("--ckpt_path" in args for args in runs.args[1:])
    assert len(runs.args) == 3


def test_a_configuration_that_has_changed_is_run_again(write: Write, tmp_path: Path) -> None:
    base = tmp_path / "base.yaml"
    base.write_text("trainer: {max_steps: 1}")
    told = {**GRID, "command": ["lit-align", "fit", "-c", str(base), "${args}"]}
    Sweep(write(told), tmp_path / "out").run(Runs(), print)
    base.write_text("trainer: {max_steps: 2}")
    runs = Runs()
    points = Sweep(write(told), tmp_path / "out").run(runs, print)["points"]
    assert len(runs.args) == 4
    assert {path.name for path in (tmp_path / "out" / "replaced").iterdir()} == {f"{p['folder']}-1" for p in points}


def test_a_metric_that_no_run_logs(write: Write, tmp_path: Path) -> None:
    runs = Runs()
    sweep = Sweep(write({**GRID, "metric": {"name": "val/acuracy"}}), tmp_path / "out")
    with pytest.raises(ValueError, match=r"metric\.name is 'val/acuracy', which no run logs; they log val/loss, val/n"):
        sweep.run(runs, print)
    assert len(runs.args) == 1


def test_a_metric_that_is_not_finite_is_the_last(write: Write, tmp_path: Path) -> None:
    result = Sweep(write({**GRID, "metric": {"name": "val/nan"}}), tmp_path / "out").run(Runs(), print)
    assert [point["metric"] for point in result["points"]] == [None] * 4
    assert "not finite" in table(result)


def test_short_names() -> None:
    keys = {LR: 1, "model.init_args.value.init_args.lr": 2, BETA: 3, "seed_everything": 4, "a.lr": 5, "lr": 6}
    expected = ["optimizer.lr", "value.lr", "beta", "seed_everything", "a.lr", "lr"]
    assert list(short_names(keys).values()) == expected


def test_configuration_files_of_a_command() -> None:
    words = ["fit", "-c", "a.yaml", "--config=b.yaml", "--config", "c.yaml", "-cd.yaml", "--x", "e.yaml", "-c"]
    assert list(map(str, config_files(words))) == ["a.yaml", "b.yaml", "c.yaml", "d.yaml"]


def test_the_name_of_a_point_is_its_arguments() -> None:
    one, other = Point({"a": 1, "b": 2}, [], "x"), Point({"b": 2, "a": 1}, ["fit"], "y")
    assert one.name == other.name
    assert one.name != Point({"a": 1, "b": 3}, [], "x").name


@pytest.fixture
def real(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The command line of a sweep of a tiny model: two learning rates, and one that is none."""
    monkeypatch.setenv("LIT_ALIGN_CACHE", str(tmp_path / "cache"))
    write_rows(tmp_path)
    only("fit", monkeypatch)
    content = config("dpo", tiny_folder(tmp_path / "model"), tmp_path, tmp_path / "run", max_steps=4)
    (tmp_path / "dpo.yaml").write_text(yaml.safe_dump(content))
    told = {
        **GRID,
        "parameters": {LR: {"values": [1.0e-4, 1.0e-2, "fast"]}},
        "command": ["lit-align", "fit", "-c", str(tmp_path / "dpo.yaml"), "--trainer.logger=WandbLogger", "${args}"],
    }
    return ["sweep", str(write(told)), "--out", str(tmp_path / "out")]


def test_a_sweep_of_real_runs(real: list[str], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    result = main(real)
    out = capsys.readouterr().out
    points = result["points"]
    for point in points[:2]:
        with (tmp_path / "out" / point["folder"] / "metrics.csv").open(newline="") as file:
            column = [row["val/loss"] for row in csv.DictReader(file) if row["val/loss"]]
        assert point["metric"] == float(column[-1])
        left = yaml.safe_load((tmp_path / "out" / point["folder"] / "config.yaml").read_text())
        assert left["model"]["init_args"]["optimizer"]["init_args"]["lr"] == point["parameters"][LR]
    assert points[0]["metric"] < points[1]["metric"]
    assert points[2]["error"].startswith("ConfigError: ")
    assert table(result) in out
    assert not (tmp_path / "run").exists()
    # The page: the table, the metric against the learning rate, and its way there; no run's name is anything but text.
    page = Page((tmp_path / "out" / "report.html").read_text())
    texts = [text.strip() for text in page.texts if text.strip()]
    assert {points[0]["folder"], f"{points[0]['metric']:.5g}", points[2]["error"]} <= set(texts)
    assert {"The metric against each parameter", "The metric on the way", "lr"} <= set(texts)
    assert "Training" not in texts
    assert page.tags.count("svg") == 2
    assert main(["report", str(tmp_path / "out")]) == tmp_path / "out" / "report.html"
    # A second time, only what failed.
    main(real)
    assert capsys.readouterr().out.count("done before") == 2
