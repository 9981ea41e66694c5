"""manifest.json: what a run was made of."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lit_align.callbacks import Manifest
from lit_align.callbacks.manifest import environment, model_hash


def test_what_is_in_it(fit: Callable, parts: tuple[str, Path], tmp_path: Path) -> None:
    fit(Manifest(tmp_path / "run", seed=5, parents=[parts[0], "on/the/hub"]), precision="bf16-mixed")
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["seed"] == 5
    assert manifest["devices"] == 1
    assert manifest["precision"] == "bf16-mixed"
    assert manifest["parents"] == {parts[0]: model_hash(Path(parts[0])), "on/the/hub": None}
    assert manifest["packages"]["torch"] == version("torch")
    assert [(entry["part"], entry["counts"]) for entry in manifest["data"]] == [("train", {"rows": 8, "examples": 8})]


def test_it_is_there_before_training(fit: Callable, tmp_path: Path) -> None:
    class Dies(Manifest):
        def on_train_start(self, *_: object) -> None:
            raise RuntimeError("died")

    with pytest.raises(RuntimeError, match="died"):
        fit(Dies(tmp_path))
    assert (tmp_path / "manifest.json").exists()


def test_the_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    commit = environment()["commit"]
    assert commit is None or re.fullmatch(r"[0-9a-f]{40}\+?", commit)
    # Neither without git nor outside a repository is it an error.
    monkeypatch.setenv("PATH", "")
    assert environment()["commit"] is None
    monkeypatch.undo()
    monkeypatch.setenv("GIT_DIR", "/nonexistent")
    assert environment()["commit"] is None


def test_a_package_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lit_align.callbacks.manifest.PACKAGES", ("torch", "no_such_package"))
    assert environment()["packages"] == {"torch": version("torch"), "no_such_package": None}


def test_the_hash_of_a_model_is_that_of_all_its_weights(tmp_path: Path) -> None:
    def written(*values: float) -> str | None:
        for number, value in enumerate(values):
            save_file({"w": torch.full((3,), value)}, tmp_path / f"model-{number}.safetensors")
        return model_hash(tmp_path)

    assert model_hash(tmp_path) is None
    assert model_hash(tmp_path / "nowhere") is None
    (tmp_path / "config.json").write_text("{}")
    assert model_hash(tmp_path) is None
    hashes = [written(1.0, 2.0), written(1.0, 3.0), written(2.0, 3.0)]
    assert len(set(hashes)) == 3
    assert hashes[0] == written(1.0, 2.0)
