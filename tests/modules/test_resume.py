"""A run that is killed and resumed is the run that was never interrupted, bit for bit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from support.configs import METHODS, config
from support.metrics import steady
from support.runs import write_rows
from support.tiny import tiny_folder

from lit_align.cli.entry import main


@pytest.fixture
def place(tmp_path: Path) -> tuple[str, Path]:
    """A model with dropout, so that the state of the random generator matters too, and rows."""
    write_rows(tmp_path)
    dropouts = {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1}
    return tiny_folder(tmp_path / "model", "gpt2", **dropouts), tmp_path


def written(place: tuple[str, Path], method: str, name: str) -> Path:
    """The configuration of a run of 8 batches in epochs of 4 (2 for PPO), saved at every second batch."""
    folder, rows = place
    per_batch = 4 if method == "ppo" else 1
    content = config(method, folder, rows, rows / name, max_steps=8 * per_batch, val_check_interval=2)
    content["checkpoint"] = {"every_n_train_steps": 2 * per_batch}
    if method != "ppo":
        content["model"]["init_args"]["network"]["dropout"] = None
    path = rows / f"{name}.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def outcome(out: Path) -> tuple[dict[str, torch.Tensor], list[str], str, dict]:
    """Weights, metrics, the model card, and the optimizer's state at the end."""
    checkpoint = torch.load(out / "checkpoints" / "last.ckpt", weights_only=True)
    state = {key: checkpoint[key] for key in ("optimizer_states", "lr_schedulers", "rng")}
    card = (out / "model" / "README.md").read_text().replace(f"# {out.name}", "# model")
    return (
        load_file(out / "model" / "model.safetensors"),
        steady(out / "metrics.csv").splitlines(),
        card,
        state,
    )


def assert_identical(one: object, other: object) -> None:
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_identical(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_identical(a, b)
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    else:
        assert one == other


@pytest.mark.slow
@pytest.mark.parametrize("batch", [3, 5])
@pytest.mark.parametrize("method", METHODS)
def test_killed_and_resumed_is_uninterrupted(method: str, batch: int, place: tuple[str, Path]) -> None:
    whole, broken = written(place, method, "whole"), written(place, method, "broken")
    main(["fit", "-c", str(whole)])
    kill = f'[{{"class_path": "support.kill.KillAfter", "init_args": {{"batch": {batch}}}}}]'
    command = [sys.executable, "-m", "lit_align", "fit", "-c", str(broken), f"--trainer.callbacks={kill}"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    killed = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    out = place[1] / "broken"
    assert not (out / "model").exists()
    main(["fit", "-c", str(broken), "--ckpt_path", str(out / "checkpoints" / "last.ckpt")])
    for one, other in zip(outcome(place[1] / "whole"), outcome(out), strict=True):
        assert_identical(one, other)


def test_a_changed_configuration_does_not_resume(place: tuple[str, Path]) -> None:
    path = written(place, "sft", "run")
    main(["fit", "-c", str(path), "--trainer.max_steps=2"])
    last = str(place[1] / "run" / "checkpoints" / "last.ckpt")
    with pytest.raises(ValueError, match=r"model\.init_args\.seed \(0, now 3\)"):
        main(["fit", "-c", str(path), "--ckpt_path", last, "--model.seed=3"])
    main(["fit", "-c", str(path), "--ckpt_path", last, "--trainer.max_steps=4"])
    assert torch.load(last, weights_only=True)["global_step"] == 4
