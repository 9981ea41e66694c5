"""A checkpoint that is damaged, in a fit and inside a pipeline: one line that names the file and the way out."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from support.configs import config
from support.parsers import only
from support.runs import write_rows
from support.tiny import tiny_folder

from lit_align.cli.entry import main


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def of_another_kind(path: Path) -> None:
    path.write_text("a letter")


def of_another_program(path: Path) -> None:
    torch.save([torch.zeros(3)], path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline of one stage, with two checkpoints, as an interruption after the training leaves it."""
    place = tmp_path_factory.mktemp("place")
    write_rows(place)
    trainer: dict[str, Any] = {"max_steps": 4, "val_check_interval": 2, "enable_progress_bar": False}
    content = config("sft", tiny_folder(place / "policy"), place, place / "run", **trainer)
    content["checkpoint"] = {"save_top_k": -1, "filename": "{step}"}
    (place / "a.yaml").write_text(yaml.safe_dump(content))
    told = {"root": str(place / "root"), "stages": {"a": {"fit": "a.yaml"}}}
    (place / "pipeline.yaml").write_text(yaml.safe_dump(told))
    with pytest.MonkeyPatch.context() as patch:
        only("fit", patch)
        patch.setenv("LIT_ALIGN_CACHE", str(place / "cache"))
        main(["pipeline", str(place / "pipeline.yaml"), "--out", str(place / "out")])
    (place / "out" / "a" / "done.json").unlink()
    return place


# Kills: a traceback; a damaged checkpoint named as the way out of another.
@pytest.mark.parametrize("damage", [truncated, emptied, of_another_kind, of_another_program])
@pytest.mark.parametrize("how", ["fit", "pipeline"])
def test_it_names_the_file_and_a_good_one(
    finished: Path, tmp_path: Path, damage: Any, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    only("fit", monkeypatch)
    monkeypatch.setenv("LIT_ALIGN_CACHE", str(finished / "cache"))
    out = tmp_path / "out"
    shutil.copytree(finished / "out", out, symlinks=True)
    checkpoints = out / "a" / "checkpoints"
    assert os.readlink(checkpoints / "last.ckpt") == "step=4.ckpt"
    damage(checkpoints / "step=4.ckpt")
    shutil.copy(checkpoints / "step=4.ckpt", checkpoints / "older.ckpt")
    command = {
        "fit": ["fit", "-c", str(finished / "a.yaml"), f"--out={out / 'a'}", "--ckpt_path", "last"],
        "pipeline": ["pipeline", str(finished / "pipeline.yaml"), "--out", str(out)],
    }[how]
    way_out = "" if damage is of_another_program else r".*newest first: [^,;]*step=2\.ckpt;"
    with pytest.raises(
        ValueError, match=rf"{out}/a/checkpoints/last\.ckpt (is damaged|is no checkpoint){way_out}"
    ) as told:
        main(command)
    assert "\n" not in str(told.value)
    # The way out.
    (checkpoints / "older.ckpt").unlink()
    (checkpoints / "step=4.ckpt").unlink()
    main(command)
    assert (out / "a" / "model").is_dir()
