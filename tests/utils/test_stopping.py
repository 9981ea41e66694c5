"""Signals at any moment of a command, and exits that a user's code calls: nothing ends with 0 while work is left."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning import Trainer
from support.configs import config
from support.metrics import steady
from support.parsers import only
from support.runs import build, write_rows
from support.signals import SLOW, Send
from support.tiny import tiny_folder

from lit_align.__main__ import entry
from lit_align.callbacks import RunCheckpoint
from lit_align.callbacks.preemption import Preempted
from lit_align.cli.entry import main
from lit_align.utils.stopping import Stopped, handler, stoppable

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    write_rows(folder)
    tiny_folder(folder / "policy")
    return folder


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Leaves the handlers as they were."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, was in before.items():
        signal.signal(number, was)


def written(place: Path, tmp_path: Path, method: str = "sft", **trainer: Any) -> dict[str, Any]:
    trainer = {"max_steps": 4, "limit_val_batches": 1, "enable_progress_bar": False, **trainer}
    content = config(method, str(place / "policy"), place, tmp_path / "run", **trainer)
    content["data"]["init_args"]["cache_dir"] = "none"
    return content


def run(content: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *more: str) -> int:
    """The exit status of `lit-align fit`, in this process."""
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(content))
    monkeypatch.setattr(sys, "argv", ["lit-align", "fit", "-c", str(tmp_path / "run.yaml"), *more])
    try:
        return entry()
    except SystemExit as ended:
        return int(ended.code or 0)


def last(folder: Path) -> dict[str, Any]:
    checkpoint: dict[str, Any] = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    return checkpoint


# Kills: a wait for the end of a slow batch; a checkpoint in the middle of a batch that does not resume to the bit.
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("validates", [False, True])
def test_a_slow_reward_is_not_waited_for(
    place: Path, tmp_path: Path, number: int, validates: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    only("fit", monkeypatch)
    interval = {"val_check_interval": 1} if validates else {"limit_val_batches": 0}
    content = written(place, tmp_path, "ppo", max_steps=16, **interval)
    content["model"]["init_args"]["reward"]["init_args"]["function"] = "support.signals.slow"
    content["checkpoint"] = {"every_n_train_steps": 100}
    SLOW.update(calls=0, at=0)
    assert run(content, tmp_path, monkeypatch) == 0
    (tmp_path / "run").rename(tmp_path / "whole")
    SLOW.update(calls=0, at=5 if validates else 3, number=int(number))
    began = time.monotonic()
    assert run(content, tmp_path, monkeypatch) == 128 + number
    assert time.monotonic() - began < 25
    assert not (tmp_path / "run" / "model").exists()
    assert last(tmp_path / "run")["global_step"] == 8
    SLOW.update(at=0)
    assert run(content, tmp_path, monkeypatch, "--ckpt_path", "last") == 0
    one, other = last(tmp_path / "whole"), last(tmp_path / "run")
    for name, weight in one["state_dict"].items():
        assert torch.equal(weight, other["state_dict"][name]), name
    torch.testing.assert_close(one["optimizer_states"], other["optimizer_states"], rtol=0, atol=0)
    assert steady(tmp_path / "whole" / "metrics.csv") == steady(tmp_path / "run" / "metrics.csv")


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_before_the_first_step_of_a_resumed_run(place: Path, tmp_path: Path) -> None:
    """From Python: Lightning leaves with 0."""

    def fit(steps: int, before: str | None, *callbacks: Any) -> Trainer:
        module, data = build("sft", str(place / "policy"), place, batch_size=2)
        trainer = Trainer(
            max_steps=steps, accelerator="cpu", precision="64-true", logger=False, enable_progress_bar=False,
            enable_model_summary=False, callbacks=[RunCheckpoint(tmp_path, save_last="link"), *callbacks],
        )  # fmt: skip
        trainer.fit(module, data, ckpt_path=before, weights_only=True if before else None)
        return trainer

    fit(2, None)
    with pytest.raises(Preempted) as left:
        fit(4, str(tmp_path / "last.ckpt"), Send("on_train_start"))
    assert left.value.code == 143
    assert fit(4, str(tmp_path / "last.ckpt")).global_step == 4


@pytest.mark.parametrize(
    ("hook", "options", "status", "says", "saved"),
    [
        ("setup", {"number": 2}, 130, "lit-align: stopped by Ctrl-C: nothing was saved yet", None),
        ("on_fit_start", {"number": 15}, 143, "lit-align: stopped by SIGTERM: nothing was saved yet", None),
        ("on_train_batch_start", {"number": 2, "step": 1}, 130, "asked to stop: optimizer step 2 is in", 2),
        ("on_validation_start", {"number": 2, "step": 2}, 130, "asked to stop: optimizer step 2 is in", 2),
        (
            "on_train_batch_start", {"number": 2, "step": 3, "times": 2}, 130,
            "lit-align: stopped by Ctrl-C: work after .*last.ckpt is lost; continue with --ckpt_path last", 2,
        ),
        ("on_fit_end", {"number": 2}, 130, "lit-align: stopped by Ctrl-C: work after .* --ckpt_path last", 4),
        ("on_fit_end", {"number": 15}, 143, "lit-align: stopped by SIGTERM: work after", 4),
    ],
)  # fmt: skip
def test_at_any_moment(
    hook: str,
    options: dict[str, Any],
    status: int,
    says: str,
    saved: int | None,
    place: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    only("fit", monkeypatch)
    content = written(place, tmp_path, val_check_interval=2)
    call = {"class_path": "support.signals.Send", "init_args": {"hook": hook, **options}}
    content["trainer"]["callbacks"] = [call]
    assert run(content, tmp_path, monkeypatch) == status
    said = capfd.readouterr().err + caplog.text
    assert re.search(says, said), said
    assert "Traceback" not in said
    if saved is None:
        assert not list((tmp_path / "run").glob("checkpoints/*"))
        return
    assert last(tmp_path / "run")["global_step"] == saved
    assert not (tmp_path / "run" / "model").exists()
    assert not list((tmp_path / "run").glob(".model*"))
    content["trainer"]["callbacks"] = []
    assert run(content, tmp_path, monkeypatch, "--ckpt_path", "last") == 0
    assert (tmp_path / "run" / "model").exists()


def test_a_child_is_not_stopped_by_the_terminal() -> None:
    """Processes that build batches get Ctrl-C too, and are needed until the batch is saved."""
    acted: list[int] = []
    handle = handler(acted.append)
    handle(signal.SIGINT, None)
    assert acted == [signal.SIGINT]
    child = os.fork()
    if child == 0:
        handle(signal.SIGINT, None)
        handle(signal.SIGTERM, None)
        os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM


def test_an_ignored_ctrl_c_stays_ignored() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with stoppable():
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
        with pytest.raises(Stopped, match="stopped by SIGTERM"):
            os.kill(os.getpid(), signal.SIGTERM)


# Kills: an exit with 0 in a user's code taken for the end of the run.
@pytest.mark.parametrize("where", ["reward", "source", "step"])
def test_an_exit_in_a_users_code_is_an_error(
    where: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    only("fit", monkeypatch)
    content = written(place, tmp_path, "ppo" if where == "reward" else "sft")
    if where == "reward":
        content["model"]["init_args"]["reward"]["init_args"]["function"] = "support.signals.leave"
    elif where == "source":
        content["data"]["init_args"]["train"] = [{"rows": {"class_path": "support.signals.Leaves"}}]
    if where == "step":
        (tmp_path / "step.yaml").write_text("class_path: support.signals.LeavingStep\n")
        (tmp_path / "pipeline.yaml").write_text("root: runs/x\nstages: {a: {call: step.yaml}}\n")
        with pytest.raises(ValueError, match=r"called sys\.exit\(0\)"):
            main(["pipeline", str(tmp_path / "pipeline.yaml"), "--out", str(tmp_path / "out")])
        assert not (tmp_path / "out" / "a" / "done.json").exists()
        return
    assert run(content, tmp_path, monkeypatch) == 1
    assert "code that the run called (a reward, a data source, a callback) called sys.exit(0)" in capfd.readouterr().err


def test_a_pipeline_whose_stage_was_interrupted_is_interrupted(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    only("fit", monkeypatch)
    content = written(place, tmp_path)
    content["trainer"]["callbacks"] = [
        {"class_path": "support.signals.Send", "init_args": {"hook": "on_train_batch_start", "number": 2, "step": 1}}
    ]
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(content))
    told = {"root": str(tmp_path / "run"), "stages": {"a": {"fit": "a.yaml"}, "b": {"fit": "a.yaml"}}}
    (tmp_path / "pipeline.yaml").write_text(yaml.safe_dump(told))
    with pytest.raises(Preempted) as left:
        main(["pipeline", str(tmp_path / "pipeline.yaml"), "--out", str(tmp_path / "out")])
    assert left.value.code == 130
    assert not (tmp_path / "out" / "a" / "done.json").exists()
    assert not (tmp_path / "out" / "b").exists()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_while_python_starts(place: Path, tmp_path: Path, number: int) -> None:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(written(place, tmp_path)))
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    command = [sys.executable, "-m", "lit_align", "fit", "-c", str(tmp_path / "run.yaml")]
    for wait in (0.6, 2.0):
        process = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
        time.sleep(wait)
        process.send_signal(number)
        said = process.communicate(timeout=60)[1]
        assert process.returncode in (128 + number, -number), said
        if process.returncode > 0:
            assert "Traceback" not in said


# Kills: workers that the terminal's Ctrl-C ends before the batch is saved.
@pytest.mark.slow
def test_ctrl_c_in_a_terminal_with_workers(place: Path, tmp_path: Path) -> None:
    """The terminal sends it to all processes of the group."""
    content = written(place, tmp_path, max_steps=100000, limit_val_batches=0)
    content["data"]["init_args"]["num_workers"] = 1
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(content))
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "lit_align", "fit", "-c", str(tmp_path / "run.yaml")]
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    end = time.monotonic() + 120
    while not (tmp_path / "run" / "metrics.csv").exists() and time.monotonic() < end:
        time.sleep(0.2)
    os.killpg(process.pid, signal.SIGINT)
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 130, said
    assert "Traceback" not in said
    assert last(tmp_path / "run")["global_step"] > 0
