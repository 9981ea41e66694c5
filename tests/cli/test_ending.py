"""What `fit` says at its end, and what becomes of the folder of a run that failed."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch.accelerators import MPSAccelerator
from support.configs import METHODS, config
from support.parsers import only
from support.runs import write_rows
from support.tiny import tiny_folder

from lit_align.cli.entry import main
from lit_align.config.errors import ConfigError


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp("parts")
    write_rows(folder)
    return tiny_folder(folder / "model"), folder


@pytest.fixture
def written(parts: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Write the configuration of a method that writes to `run`, and return the arguments of its fit."""
    only("fit", monkeypatch)
    monkeypatch.setenv("LIT_ALIGN_CACHE", str(tmp_path / "cache"))

    def written(method: str, **trainer: Any) -> list[str]:
        content = config(method, *parts, tmp_path / "run", **{"max_steps": 4, "enable_progress_bar": False, **trainer})
        (tmp_path / f"{method}.yaml").write_text(yaml.safe_dump(content))
        return ["fit", "-c", str(tmp_path / f"{method}.yaml")]

    return written


FIGURES = {
    "sft": ("train/loss", "val/loss"),
    "reward": ("train/loss", "val/loss", "val/accuracy"),
    "dpo": ("train/loss", "val/loss", "val/accuracy"),
    "ppo": ("ppo/reward", "ppo/kl"),
}


@pytest.mark.parametrize("method", METHODS)
def test_the_last_figures_and_the_folder(
    written: Any, tmp_path: Path, capsys: pytest.CaptureFixture, method: str
) -> None:
    main(written(method))
    *_, figures, model = capsys.readouterr().out.splitlines()
    assert re.match(r"4 optimizer steps in \d+ s: ", figures)
    assert all(re.search(rf"{name} -?\d", figures) for name in FIGURES[method]), figures
    assert model == f"model: {tmp_path / 'run' / 'model'}"


def test_the_best_is_named(written: Any, capsys: pytest.CaptureFixture) -> None:
    args = written("sft", val_check_interval=2)
    main([*args, "--checkpoint.monitor=val/loss", "--checkpoint.every_n_train_steps=2"])
    assert re.search(r"run/model \(optimizer step \d, the best by val/loss: ", capsys.readouterr().out)


def test_a_run_that_failed_early_leaves_its_folder_to_the_next(
    written: Any, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    args = written("ppo")
    with pytest.raises(ValueError, match="the reward is broken"):
        main([*args, "--model.reward.function=support.runs.fails"])
    assert (tmp_path / "run" / "config.yaml").exists()
    capsys.readouterr()
    main(args)
    assert (
        "ended before its first checkpoint, so its folder is used again; config-failed.yaml" in capsys.readouterr().out
    )
    assert not (tmp_path / "run-2").exists()
    assert (tmp_path / "run" / "model" / "config.json").exists()
    assert "support.runs.fails" in (tmp_path / "run" / "config-failed.yaml").read_text()


def test_a_run_with_a_checkpoint_keeps_its_folder(written: Any, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    args = written("sft")
    main(args)
    for path in (tmp_path / "run" / "model").iterdir():
        path.unlink()
    os.rmdir(tmp_path / "run" / "model")
    capsys.readouterr()
    main(args)
    said = capsys.readouterr().out
    assert f"{tmp_path / 'run'} holds another run: this one goes to {tmp_path / 'run-2'}; the other one has not" in said
    assert "--ckpt_path last" in said


def test_a_configuration_of_the_user_is_not_a_failed_run(written: Any, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("mine: 1\n")
    main(written("sft"))
    assert (tmp_path / "run" / "config.yaml").read_text() == "mine: 1\n"
    assert (tmp_path / "run-2" / "model").is_dir()


# Kills: a traceback for a key that only the class itself can refuse.
@pytest.mark.parametrize("part", ["model", "data"])
def test_a_dict_kwarg_that_the_class_lacks_is_named(written: Any, part: str) -> None:
    file = Path(written("sft")[2])
    content = yaml.safe_load(file.read_text())
    content[part]["dict_kwargs"] = {"batches": 3}
    file.write_text(yaml.safe_dump(content))
    with pytest.raises(ConfigError, match=r"dict_kwargs.batches: .* has no such option"):
        main(["fit", "-c", str(file)])


# Kills: the sums of float64 that MPS does not have.
def test_on_a_mac_the_cpu_is_taken(
    written: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    file = Path(written("sft")[2])
    content = yaml.safe_load(file.read_text())
    del content["trainer"]["accelerator"]
    file.write_text(yaml.safe_dump(content))
    monkeypatch.setattr(MPSAccelerator, "is_available", staticmethod(lambda: True))
    main(["fit", "-c", str(file)])
    assert "trainer.accelerator: cpu, because MPS has no float64" in capsys.readouterr().out


# Kills: a file from elsewhere that has pickles unpacked.
@pytest.mark.parametrize("inside", [True, False])
def test_a_file_cannot_ask_for_pickles(written: Any, inside: bool) -> None:
    file = Path(written("sft")[2])
    content = {**yaml.safe_load(file.read_text()), "weights_only": False}
    file.write_text(yaml.safe_dump({"fit": content} if inside else content))
    with pytest.raises(ConfigError, match="give --weights_only false on the command line"):
        main(["fit", "-c", str(file)])
