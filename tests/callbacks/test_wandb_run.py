"""A resumed run goes on in its run of Weights & Biases; a new one is another run there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from support.configs import config
from support.wandb_server import serve

from lit_align.callbacks.wandb_run import VARIABLE
from lit_align.cli.entry import main

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Weights & Biases without a network and without a word, in a folder of its own."""
    wandb = pytest.importorskip("wandb")
    folder = tmp_path / "tracking"
    folder.mkdir()
    monkeypatch.chdir(folder)
    for name, value in {"MODE": "offline", "SILENT": "true", "DIR": str(folder), "CONSOLE": "off"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    monkeypatch.delenv(VARIABLE, raising=False)
    yield folder
    wandb.teardown()


def written(parts: tuple[str, Path], folder: Path, **init: str) -> list[str]:
    """A command line of two steps."""
    content = config("sft", *parts, folder / "run", max_steps=2)
    content["trainer"]["logger"] = {"class_path": "WandbLogger", "init_args": {"project": "lit_align", **init}}
    content["data"]["init_args"]["cache_dir"] = "none"
    (folder / "run.yaml").write_text(yaml.safe_dump(content))
    return ["fit", "-c", str(folder / "run.yaml")]


# Kills: a second run of W&B for the second half; the id of an old run for a new one.
def test_a_resumed_run_is_the_same_run_there(
    parts: tuple[str, Path], offline: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    args = written(parts, tmp_path)
    first = main(args).trainer.logger.version
    told = json.loads((tmp_path / "run" / "manifest.json").read_text())["wandb"]
    assert told == {"id": first, "project": "lit_align"}
    assert main([*args, "--ckpt_path=last", "--trainer.max_steps=4"]).trainer.logger.version == first
    assert f"goes on in W&B's run {first} of lit_align" in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["wandb"] == told
    # Its configuration, run anew, is another run.
    other = main(["fit", "-c", str(tmp_path / "run" / "config.yaml"), "--ckpt_path=null"]).trainer.logger.version
    assert other != first
    tracked = sorted(path.name.rpartition("-")[2] for path in (offline / "wandb").glob("offline-run-*"))
    assert tracked == sorted([first, first, other])


def test_who_names_a_run_gets_it(
    parts: tuple[str, Path],
    offline: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    args = written(parts, tmp_path)
    main(args)
    resumed = [*args, "--ckpt_path=last"]
    assert main([*resumed, "--trainer.max_steps=3", "--trainer.logger.id=mine"]).trainer.logger.version == "mine"
    monkeypatch.setenv(VARIABLE, "agents")  # which W&B reads once in a process
    main([*resumed, "--trainer.max_steps=4"])
    assert "goes on in W&B" not in capsys.readouterr().out


@pytest.mark.slow
def test_the_server_sees_one_run(parts: tuple[str, Path], tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    args = written(parts, tmp_path)
    with serve([]) as server:
        kept = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
        told = {"BASE_URL": server.url, "API_KEY": "a" * 40, "ENTITY": "somebody", "ERROR_REPORTING": "false"}
        environment = {**kept, **{f"WANDB_{name}": value for name, value in told.items()}, "HOME": str(tmp_path)}
        environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[2]), str(Path(__file__).parents[1])])
        for more in ([], ["--ckpt_path=last", "--trainer.max_steps=4"]):
            command = [sys.executable, "-m", "lit_align", *args, *more]
            done = subprocess.run(
                command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False
            )
            assert done.returncode == 0, done.stderr[-2000:]
        (run,) = server.runs.values()
        losses = [row["trainer/global_step"] for row in run.history if "train/loss" in row]
        assert losses == [0, 1, 2, 3]
        assert run.exits == [0, 0]
