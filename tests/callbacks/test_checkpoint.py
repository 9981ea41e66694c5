"""There is a checkpoint to go on from, and the run that goes on is logged as if it had not been interrupted."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch import Callback
from safetensors.torch import load_file
from support.configs import config
from support.metrics import steady
from support.parsers import only

from lit_align.callbacks import RunCheckpoint
from lit_align.cli.entry import main


@pytest.fixture
def command(parts: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Fit for three epochs of four batches into a folder."""
    monkeypatch.setenv("LIT_ALIGN_CACHE", str(tmp_path / "cache"))
    only("fit", monkeypatch)

    def fit(method: str, name: str, *more: str) -> None:
        content = config(method, *parts, tmp_path / name, max_epochs=3)
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(content))
        main(["fit", "-c", str(tmp_path / f"{name}.yaml"), *more])

    return fit


def stop(batch: int) -> str:
    return f'--trainer.callbacks=[{{"class_path": "support.stop.StopAt", "init_args": {{"batch": {batch}}}}}]'


def step(folder: Path) -> int:
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]


@pytest.mark.parametrize(
    ("method", "more", "batch", "saved"),
    [
        ("sft", [], 7, 4),  # at the end of an epoch, which is where it is validated
        ("sft", ["--trainer.max_steps=12"], 7, 4),
        ("sft", ["--trainer.max_steps=12", "--trainer.limit_val_batches=0"], 7, 4),
        pytest.param("reward", ["--trainer.accumulate_grad_batches=2"], 7, 2, marks=pytest.mark.slow),
        pytest.param("sft", ["--trainer.val_check_interval=0.5"], 7, 6, marks=pytest.mark.slow),
        pytest.param("ppo", [], 4, 8, marks=pytest.mark.slow),
        pytest.param("sft", ["--trainer.check_val_every_n_epoch=2"], 11, 8, marks=pytest.mark.slow),
    ],
)
def test_interrupted_and_resumed(
    command: Callable[..., None], tmp_path: Path, method: str, more: list[str], batch: int, saved: int
) -> None:
    command(method, "whole", *more)
    with pytest.raises(RuntimeError, match="stopped"):
        command(method, "broken", *more, stop(batch))
    assert step(tmp_path / "broken") == saved
    command(method, "broken", *more, f"--ckpt_path={tmp_path / 'broken' / 'checkpoints' / 'last.ckpt'}")
    whole, broken = (tmp_path / name / "metrics.csv" for name in ("whole", "broken"))
    assert steady(whole) == steady(broken)
    one, other = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "broken"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    # The latest, and a name for it.
    for name in ("whole", "broken"):
        files = list((tmp_path / name / "checkpoints").iterdir())
        assert sorted(path.is_symlink() for path in files) == [False, True]


def test_what_validation_has_changed_is_saved(command: Callable[..., None], tmp_path: Path) -> None:
    """A reward model is normalised by it."""
    with pytest.raises(RuntimeError, match="stopped"):
        command("reward", "run", stop(5))
    state = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert (state["scorer.mean"], state["scorer.std"]) != (0, 1)


def test_the_last_steps_are_saved_too(command: Callable[..., None], tmp_path: Path) -> None:
    command("sft", "run", "--trainer.max_steps=6")
    assert step(tmp_path / "run") == 6


@pytest.mark.parametrize(("every", "saved"), [(1, 8), (2, 8), (3, None)])
def test_without_validation_epochs_are_saved(
    command: Callable[..., None], tmp_path: Path, every: int, saved: int | None
) -> None:
    with pytest.raises(RuntimeError, match="stopped"):
        command("sft", "run", "--trainer.limit_val_batches=0", f"--checkpoint.every_n_epochs={every}", stop(9))
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    assert (step(tmp_path / "run") if last.exists() else None) == saved


def test_what_is_asked_for_is_done(command: Callable[..., None], tmp_path: Path) -> None:
    command("sft", "best", "--checkpoint.monitor=val/loss", "--checkpoint.save_top_k=2", "--checkpoint.filename={step}")
    assert {path.name for path in (tmp_path / "best" / "checkpoints").iterdir()} == {
        "step=8.ckpt",
        "step=12.ckpt",
        "best.ckpt",
        "last.ckpt",
    }
    with pytest.raises(RuntimeError, match="stopped"):
        command("sft", "often", "--checkpoint.every_n_train_steps=3", stop(8))
    assert step(tmp_path / "often") == 6
    command(
        "sft",
        "epochs",
        "--trainer.val_check_interval=0.5",
        "--checkpoint.save_on_train_epoch_end=true",
        "--checkpoint.save_top_k=-1",
    )
    assert len(list((tmp_path / "epochs" / "checkpoints").iterdir())) == 3 + 1


def test_the_last_is_the_last_however_many_are_kept(command: Callable[..., None], tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="stopped"):
        command("sft", "run", "--checkpoint.save_top_k=-1", stop(5))
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    command("sft", "run", "--checkpoint.save_top_k=-1", f"--ckpt_path={last}")
    assert step(tmp_path / "run") == 12
    assert len(list(last.parent.iterdir())) == 3 + 1


class _Ask(Callback):
    """Sends this process a signal in the middle of training."""

    def __init__(self, number: int) -> None:
        self.number = number

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 1:
            os.kill(os.getpid(), self.number)


# Kills: last.ckpt named where there is none; the handler of Lightning; no exit status.
@pytest.mark.parametrize("save_last", [False, "link", True])
def test_who_is_asked_to_stop_says_where_the_run_is(
    fit: Callable[..., Any], tmp_path: Path, caplog: pytest.LogCaptureFixture, save_last: Any
) -> None:
    keep = RunCheckpoint(dirpath=tmp_path / "kept", save_last=save_last)
    with caplog.at_level("INFO"), pytest.raises(SystemExit) as ended:
        fit(keep, _Ask(signal.SIGTERM), enable_checkpointing=True)
    assert ended.value.code == 128 + signal.SIGTERM
    (said,) = re.findall(r"optimizer step 2 is in (\S+); go on", caplog.text)
    assert torch.load(said, weights_only=True)["global_step"] == 2
    assert (Path(said).name == "last.ckpt") == bool(save_last)


SCONTROL = """#!/bin/sh
echo "$@" >> "$(dirname "$0")/asked"
"""


# Kills: no requeue; before it is saved.
def test_slurms_signal_has_the_job_queued_again(
    fit: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "scontrol").write_text(SCONTROL)
    (tmp_path / "bin" / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    for name, value in {"JOB_ID": "7", "JOB_NAME": "a", "NTASKS": "1", "PROCID": "0", "LOCALID": "0"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    with pytest.raises(SystemExit):
        fit(
            RunCheckpoint(dirpath=tmp_path / "kept", save_last="link"), _Ask(signal.SIGUSR1),
            enable_checkpointing=True, plugins=[SLURMEnvironment()],
        )  # fmt: skip
    assert (tmp_path / "bin" / "asked").read_text() == "requeue 7\n"
    assert torch.load(tmp_path / "kept" / "last.ckpt", weights_only=True)["global_step"] == 2
