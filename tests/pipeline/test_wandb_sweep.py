"""The real `wandb sweep` and `wandb agent` against a stand-in of their server: nothing leaves this machine."""

from __future__ import annotations

import csv
import io
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from support.configs import config
from support.metrics import steady
from support.runs import write_rows
from support.tiny import tiny_folder
from support.wandb_server import SWEEP, Server, serve

pytestmark = pytest.mark.slow

# The console scripts of this interpreter's environment; the agent looks commands up on PATH.
SCRIPTS = Path(sys.executable).parent
CALLBACKS = "trainer.callbacks"
LR = "model.init_args.optimizer.init_args.lr"
TESTS = Path(__file__).parents[1]


@dataclass
class Place:
    """A folder with a sweep in it, a server, and the processes begun there."""

    folder: Path
    server: Server
    begun: list[subprocess.Popen[str]]

    def wandb(self, *args: str) -> subprocess.Popen[str]:
        # Nothing of the user's W&B: no settings, no key, no mode.
        kept = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
        environment = {
            **kept,
            "WANDB_BASE_URL": self.server.url,
            "WANDB_API_KEY": "a" * 40,
            "WANDB_ERROR_REPORTING": "false",
            "WANDB_ENTITY": "somebody",
            "HOME": str(self.folder),
            "TMPDIR": str(self.folder),
            "LIT_ALIGN_CACHE": str(self.folder / "cache"),
            "PATH": os.pathsep.join([str(SCRIPTS), os.environ["PATH"]]),
            "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)]),
        }
        # Output to a file: a pipe that nobody reads would stop them.
        with (self.folder / f"output-{len(self.begun)}.txt").open("w") as output:
            process = subprocess.Popen(
                [str(SCRIPTS / "wandb"), *args],
                cwd=self.folder, env=environment, text=True, stdout=output, stderr=subprocess.STDOUT,
                # A script that puts the tests in the background has them ignore interrupts, and so their children.
                start_new_session=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )  # fmt: skip
        self.begun.append(process)
        return process

    def said(self, number: int = -1) -> str:
        return (self.folder / f"output-{number % len(self.begun)}.txt").read_text()

    def sweep(self, **sweep: Any) -> None:
        """Register one of a run in an own folder, that goes on where it was."""
        command = ["lit-align", "fit", "-c", "sft.yaml", "${args}", "--trainer.logger=WandbLogger"]
        command += ["--out=runs/$WANDB_RUN_ID", "--ckpt_path=last"]
        told = {"method": "grid", "metric": {"name": "val/loss"}, "command": command, **sweep}
        (self.folder / "sweep.yaml").write_text(yaml.safe_dump(told, sort_keys=False))
        assert self.wandb("sweep", "--project", "lit_align", "sweep.yaml").wait(100) == 0, self.said()
        assert f"somebody/lit_align/{SWEEP}" in self.said()
        assert yaml.safe_load(self.server.config)["command"] == command

    def agent(self, *options: str) -> subprocess.Popen[str]:
        return self.wandb("agent", *options, f"somebody/lit_align/{SWEEP}")

    def rows(self, run: str) -> list[dict[str, str]]:
        return list(csv.DictReader(io.StringIO(steady(self.folder / "runs" / run / "metrics.csv"))))


def work(run: str, kind: str = "run", **args: Any) -> dict[str, Any]:
    """What the server tells the agent to do."""
    told = {key.replace("__", "."): {"value": value} for key, value in args.items()}
    return {"type": kind, "run_id": run, "program": "lit-align", "args": told}


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    if not all(shutil.which(name, path=str(SCRIPTS)) for name in ("wandb", "lit-align")):
        pytest.skip("wandb and lit-align are not installed as commands")
    write_rows(tmp_path)
    content = config("sft", tiny_folder(tmp_path / "model"), tmp_path, tmp_path / "run", max_steps=6)
    content["trainer"]["val_check_interval"] = 2
    (tmp_path / "sft.yaml").write_text(yaml.safe_dump(content))
    with serve([]) as server:
        here = Place(tmp_path, server, [])
        yield here
        for process in here.begun:
            # The group: runs outlive an agent that was ended.
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def test_an_agent_runs_the_points_and_reports_one_that_fails(place: Place) -> None:
    stop = "[{class_path: support.stop.StopAt, init_args: {batch: 3}}]"
    place.sweep(parameters={LR: {"values": [0.01, 0.02]}})
    args = [{LR.replace(".", "__"): 0.01}, {LR.replace(".", "__"): 0.02, CALLBACKS.replace(".", "__"): stop}]
    place.server.work += [work("good", **args[0]), work("poor", **args[1])]
    assert place.agent().wait(300) == 0, place.said()
    runs = place.server.runs
    assert {name: run.exits for name, run in runs.items()} == {"good": [0], "poor": [1]}, place.said()
    assert {run.sweep for run in runs.values()} == {SWEEP}
    # The arguments arrived, in a folder each.
    for name, lr in (("good", 0.01), ("poor", 0.02)):
        left = yaml.safe_load((place.folder / "runs" / name / "config.yaml").read_text())
        assert left["model"]["init_args"]["optimizer"]["init_args"]["lr"] == lr
    # What the server was told is what the run wrote down.
    losses = [float(row["val/loss"]) for row in place.rows("good") if row["val/loss"]]
    assert [row["val/loss"] for row in runs["good"].history if "val/loss" in row] == pytest.approx(losses)
    assert len(losses) == 3
    assert (place.folder / "runs" / "good" / "model" / "model.safetensors").exists()
    assert not (place.folder / "runs" / "poor" / "model").exists()


def test_a_preempted_run_goes_on_from_its_own_checkpoint(place: Place) -> None:
    flag = place.folder / "killed"
    kill = f"[{{class_path: support.kill.KillAfter, init_args: {{batch: 5, once: {flag}}}}}]"
    place.sweep(parameters={CALLBACKS: {"value": kill}})
    callbacks = {CALLBACKS.replace(".", "__"): kill}
    place.server.work += [work("torn", **callbacks), work("torn", "resume", **callbacks), work("whole", **callbacks)]
    assert place.agent().wait(400) == 0, place.said()
    assert flag.exists()
    # The killed process said nothing more; the second ended well.
    assert {name: run.exits for name, run in place.server.runs.items()} == {"torn": [0], "whole": [0]}, place.said()
    assert sorted(path.name for path in (place.folder / "runs").iterdir()) == ["torn", "whole"]
    assert place.rows("torn") == place.rows("whole")
    ends = [
        torch.load(place.folder / "runs" / name / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for name in ("torn", "whole")
    ]
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[1])
    # It went on: the steps before the checkpoint were taken once.
    assert place.said().count("Restoring states from the checkpoint") == 1, place.said()


@pytest.mark.parametrize("forward", [False, True], ids=["agent", "forwarded"])
def test_an_interrupt_stops_the_agent(place: Place, forward: bool) -> None:
    """Without --forward-signals the run that is under way ends first; with it, it is stopped too."""
    place.sweep(parameters={"trainer.max_steps": {"value": 400}})
    place.server.work += [work(name, trainer__max_steps=400, trainer__max_epochs=-1) for name in ("one", "two")]
    agent = place.agent(*["--forward-signals"] * forward)
    began = time.monotonic()
    while not (place.folder / "runs" / "one" / "checkpoints" / "last.ckpt").exists():
        assert agent.poll() is None, place.said()
        assert time.monotonic() - began < 200, place.said()
        time.sleep(0.05)
    agent.send_signal(signal.SIGINT)
    assert agent.wait(300) == 0, place.said()
    assert len(place.server.work) == 1
    assert place.server.runs["one"].exits == [1 if forward else 0], place.said()
    assert not (place.folder / "runs" / "two").exists()
    steps = torch.load(place.folder / "runs" / "one" / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]
    assert (steps < 400) == forward
