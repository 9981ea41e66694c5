"""SLURM's signal: saved where it is exact, the job put back, and its folder found again."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.plugins.environments import SLURMEnvironment
from support.configs import config
from support.parsers import only
from support.runs import build

from lit_align.callbacks.checkpoint import RunCheckpoint
from lit_align.callbacks.preemption import Preempted
from lit_align.cli.entry import main
from lit_align.cli.run_folder import requeued_folder


class Signal(Callback):
    """Asks this process to stop in the middle of an accumulation.

    Args:
        number: the signal.
    """

    def __init__(self, number: int = signal.SIGTERM) -> None:
        self.number = number

    def on_train_batch_start(self, trainer: Trainer, *call: Any) -> None:
        """Ask, in the third of the batches."""
        if trainer.fit_loop.total_batch_idx == 2:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize("slurm", [False, True])
def test_asked_to_stop_it_saves_after_the_accumulation(
    parts: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slurm: bool
) -> None:
    only("fit", monkeypatch)
    monkeypatch.setenv("LIT_ALIGN_CACHE", str(tmp_path / "cache"))
    number = signal.SIGUSR1 if slurm else signal.SIGTERM
    content = config("sft", *parts, tmp_path / "run", max_steps=4, accumulate_grad_batches=2)
    content["data"]["init_args"]["batch_size"] = 1
    call = {"class_path": f"{__name__}.Signal", "init_args": {"number": int(number)}}
    content["trainer"]["callbacks"] = [call]
    if slurm:
        (tmp_path / "bin").mkdir()
        program = tmp_path / "bin" / "scontrol"
        program.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\n')
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
        for name, value in {"NTASKS": 1, "JOB_ID": 77, "JOB_NAME": "x", "PROCID": 0, "LOCALID": 0, "NODEID": 0}.items():
            monkeypatch.setenv(f"SLURM_{name}", str(value))
        assert SLURMEnvironment.detect()
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(Preempted) as left:
        main(["fit", "-c", str(tmp_path / "run.yaml")])
    assert left.value.code == 143
    saved = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 2  # not after the third batch, of which the gradients would be lost
    assert not (tmp_path / "run" / "model").exists()
    assert signal.getsignal(number) == signal.SIG_DFL
    if slurm:
        assert (tmp_path / "asked").read_text() == "requeue 77\n"
        monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
        assert requeued_folder(tmp_path / "run") == tmp_path / "run"
        assert requeued_folder(tmp_path / "other") is None


# Kills: leaving before the validation that is due, which a resumed run would not catch up on.
def test_a_validation_that_is_due_comes_first(parts: tuple[str, Path], tmp_path: Path) -> None:
    module, data = build("sft", *parts, val_fraction=0.25, batch_size=2)
    best = RunCheckpoint(dirpath=tmp_path / "checkpoints", monitor="val/loss", save_top_k=-1, filename="{step}")
    trainer = Trainer(
        max_steps=9, val_check_interval=1, accelerator="cpu", precision="64-true", logger=False, num_sanity_val_steps=0,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[Signal(), best],
    )  # fmt: skip
    with pytest.raises(Preempted):
        trainer.fit(module, data)
    assert trainer.global_step == 3
    assert any(path.name.startswith("step=3") for path in (tmp_path / "checkpoints").iterdir())
