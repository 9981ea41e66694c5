"""Checkpoint files are there whole or not at all, and damage is said in one line."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_align.callbacks import AtomicCheckpointIO

CHECKPOINT: dict[str, Any] = {"state_dict": {"a": torch.arange(1000.0)}, "pytorch-lightning_version": "2.6"}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "checkpoints" / "step=1.ckpt"
    AtomicCheckpointIO().save_checkpoint(CHECKPOINT, path)
    return path


def test_what_was_saved_is_loaded(saved: Path) -> None:
    assert torch.equal(AtomicCheckpointIO().load_checkpoint(saved)["state_dict"]["a"], torch.arange(1000.0))
    assert [path.name for path in saved.parent.iterdir()] == ["step=1.ckpt"]


@pytest.mark.parametrize("how", ["cut", "empty", "zeros", "flipped", "text"])
def test_a_damaged_one_is_refused_and_another_named(saved: Path, how: str) -> None:
    AtomicCheckpointIO().save_checkpoint(CHECKPOINT, saved.with_name("step=0.ckpt"))
    raw = saved.read_bytes()
    middle = raw.index(torch.arange(1000.0).numpy().tobytes()[400:440])
    flipped = raw[:middle] + bytes([raw[middle] ^ 1]) + raw[middle + 1 :]
    content = {"cut": raw[:-100], "empty": b"", "zeros": bytes(len(raw)), "flipped": flipped, "text": b"{}"}
    saved.write_bytes(content[how])
    with pytest.raises(ValueError, match=r"step=1\.ckpt is damaged .*newest first: .*step=0\.ckpt") as told:
        AtomicCheckpointIO().load_checkpoint(saved)
    assert "\n" not in str(told.value)


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    torch.save([1], tmp_path / "list.ckpt")
    with pytest.raises(ValueError, match="no checkpoint of a run: it holds list"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "list.ckpt")
    with pytest.raises(FileNotFoundError, match="Checkpoint file not found"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "none.ckpt")


@pytest.mark.parametrize("at", ["write", "sync", "check"])
def test_a_disk_that_does_not_keep_it_leaves_the_one_before(
    saved: Path, at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, save = saved.read_bytes(), torch.save

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    def flawed(content: Any, file: Any) -> None:
        """What was written comes back as something else."""
        save(content, file)
        file.seek(3000)
        file.write(b"\xff")

    if at == "write":
        monkeypatch.setattr(torch, "save", full)
    elif at == "sync":
        monkeypatch.setattr(os, "fsync", full)
    else:
        monkeypatch.setattr(torch, "save", flawed)
    with pytest.raises(OSError, match=r"No space left on device: the checkpoint was not|did not keep"):
        AtomicCheckpointIO().save_checkpoint(CHECKPOINT, saved)
    assert saved.read_bytes() == before
    assert [path.name for path in saved.parent.iterdir()] == ["step=1.ckpt"]
