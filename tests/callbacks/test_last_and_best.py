"""With a monitored metric, `last` is the last step and `best` is the best, and the user chooses which is exported."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from support.configs import config
from support.metrics import steady
from support.parsers import only

from lit_align.cli.entry import main

# The loss falls, so that by `max` the first validation is the best.
FIRST = ["--checkpoint.monitor=val/loss", "--checkpoint.mode=max", "--checkpoint.filename={step}"]


@pytest.fixture
def command(parts: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Fit for three epochs of four batches into a folder, validating after each."""
    monkeypatch.setenv("LIT_ALIGN_CACHE", str(tmp_path / "cache"))
    only("fit", monkeypatch)

    def fit(name: str, *more: str, method: str = "sft") -> Path:
        content = config(method, *parts, tmp_path / name, max_epochs=3)
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(content))
        main(["fit", "-c", str(tmp_path / f"{name}.yaml"), *more])
        return tmp_path / name

    return fit


def stop(batch: int) -> str:
    return f'--trainer.callbacks=[{{"class_path": "support.stop.StopAt", "init_args": {{"batch": {batch}}}}}]'


def step(run: Path, name: str = "last") -> int:
    return load(run, name)["global_step"]


def load(run: Path, name: str) -> dict[str, Any]:
    return torch.load(run / "checkpoints" / f"{name}.ckpt", weights_only=True)


def weights_of(run: Path, name: str) -> dict[str, torch.Tensor]:
    state = load(run, name)["state_dict"]
    return {key.removeprefix("policy.hf."): weight for key, weight in state.items()}


def exported(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model" / "model.safetensors")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(weight, other[name]) for name, weight in one.items())


# Kills: last.ckpt that leads to the best.
@pytest.mark.parametrize(
    ("more", "last", "best", "files"),
    [
        ([], 12, 4, {"step=4"}),
        (["--checkpoint.save_top_k=2"], 12, 4, {"step=4", "step=8"}),
        (["--checkpoint.save_top_k=-1"], 12, 4, {"step=4", "step=8", "step=12"}),
        (["--trainer.max_steps=10"], 10, 4, {"step=4"}),
        (["--checkpoint.every_n_train_steps=3"], 12, 4, {"step=4"}),
        (["--checkpoint.mode=min"], 12, 12, {"step=12"}),
        (["--checkpoint.every_n_epochs=2"], 12, 8, {"step=8"}),
        (["--checkpoint.save_last=true"], 12, 4, {"step=4"}),
    ],
    ids=lambda value: value[0].rpartition(".")[-1] if isinstance(value, list) and value else None,
)
def test_both_are_there(command: Callable[..., Path], more: list[str], last: int, best: int, files: set[str]) -> None:
    run = command("run", *FIRST, *more)
    assert (step(run), step(run, "best")) == (last, best)
    assert {path.stem for path in (run / "checkpoints").iterdir()} == {"last", "best"} | files


# Kills: a run that goes on from the best; one that forgets which was the best.
@pytest.mark.parametrize(("more", "batch", "saved"), [([], 11, 8), (["--checkpoint.every_n_train_steps=3"], 11, 9)])
def test_interrupted_and_resumed(command: Callable[..., Path], more: list[str], batch: int, saved: int) -> None:
    whole = command("whole", *FIRST, *more)
    with pytest.raises(RuntimeError, match="stopped"):
        command("broken", *FIRST, *more, stop(batch))
    broken = whole.with_name("broken")
    assert (step(broken), step(broken, "best")) == (saved, 4)
    command("broken", *FIRST, *more, "--ckpt_path=last")
    assert steady(whole / "metrics.csv") == steady(broken / "metrics.csv")
    assert same(exported(whole), exported(broken))
    assert same(weights_of(whole, "last"), weights_of(broken, "last"))
    names = [sorted(path.name for path in (run / "checkpoints").iterdir()) for run in (whole, broken)]
    assert names[0] == names[1]
    cards = [(run / "model" / "README.md").read_text().replace("broken", "whole") for run in (whole, broken)]
    assert cards[0] == cards[1]


def test_a_run_goes_on_from_the_best(command: Callable[..., Path]) -> None:
    run = command("run", *FIRST, "--trainer.max_epochs=2")
    assert (step(run), step(run, "best")) == (8, 4)
    command("run", *FIRST, "--ckpt_path=best")
    assert (step(run), step(run, "best")) == (12, 4)
    with pytest.raises(FileNotFoundError, match=r"best.ckpt"):
        command("other", *FIRST, "--ckpt_path=best")


def test_a_moved_run_knows_its_best(command: Callable[..., Path]) -> None:
    before = command("run", *FIRST, "--trainer.max_epochs=2")
    run = before.rename(before.with_name("moved"))
    command("moved", *FIRST, "--ckpt_path=last")
    assert (step(run), step(run, "best")) == (12, 4)
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"step=4.ckpt", "last.ckpt", "best.ckpt"}
    assert not before.exists()


# Kills: the export of the last where a metric is monitored; a card that does not name the step.
@pytest.mark.parametrize(
    ("more", "which", "number"),
    [
        (FIRST, "best", 4),
        ([*FIRST, "--export=best"], "best", 4),
        ([*FIRST, "--export=last"], "last", 12),
        ([], "last", 12),
        (["--export=last"], "last", 12),
    ],
)
def test_what_is_exported(command: Callable[..., Path], more: list[str], which: str, number: int) -> None:
    run = command("run", *more)
    assert same(exported(run), weights_of(run, which))
    told = json.loads((run / "model" / "lit_align.json").read_text())
    assert (told["which"], told["step"], told["steps"]) == (which, number, 12)
    card = (run / "model" / "README.md").read_text()
    assert f"optimizer step {number} of 12" in card if number < 12 else "after 12 optimizer steps" in card
    with (run / "metrics.csv").open() as file:
        header, *rows = (line.rstrip("\n").split(",") for line in file)
    row = {name: index for index, name in enumerate(header)}["val/loss"]
    losses = [float(line[row]) for line in rows if line[row]]
    assert f"| val/loss | {losses[number // 4 - 1]:.5g} |" in card


def test_the_best_needs_a_metric(command: Callable[..., Path]) -> None:
    with pytest.raises(ValueError, match=r"export: best needs checkpoint.monitor"):
        command("run", "--export=best")


# Kills: the weights themselves, or the average of the last step, in place of the best step's average.
def test_the_average_of_the_best_step(command: Callable[..., Path]) -> None:
    ema = '--trainer.callbacks=[{"class_path": "lit_align.callbacks.WeightEMA", "init_args": {"decay": 0.5}}]'
    run = command("run", *FIRST, ema)
    (state,) = (state for key, state in load(run, "best")["callbacks"].items() if key.startswith("WeightEMA"))
    average = {key.removeprefix("policy.hf."): weight for key, weight in state["average"].items()}
    assert same(average, exported(run))
    assert not same(average, weights_of(run, "best"))


def test_the_best_reward_model_has_its_own_scale(command: Callable[..., Path]) -> None:
    run = command("run", *FIRST, method="reward")
    told = json.loads((run / "model" / "config.json").read_text())
    state = load(run, "best")["state_dict"]
    assert told["reward_mean"] == pytest.approx(state["scorer.mean"].item())
    assert told["reward_mean"] != pytest.approx(load(run, "last")["state_dict"]["scorer.mean"].item())
