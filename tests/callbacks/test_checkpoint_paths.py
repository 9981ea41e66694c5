"""A checkpoint names the files that are removed after the next one: nothing outside of the run's folder is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from support.configs import config
from support.parsers import only
from support.runs import write_rows
from support.tiny import tiny_folder

from lit_align.cli.entry import main


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_checkpoint_removes_nothing_elsewhere(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    only("fit", monkeypatch)
    write_rows(tmp_path)
    content = config("sft", tiny_folder(tmp_path / "model"), tmp_path, tmp_path / "run", max_steps=1)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(content))
    main(["fit", "-c", str(tmp_path / "run.yaml")])
    folder = tmp_path / "run" / "checkpoints"
    for name in ("victim", "victim.ckpt", "run/notes.ckpt"):
        if kind == "folder":
            (tmp_path / name).mkdir()
            (tmp_path / name / "kept").touch()
        else:
            (tmp_path / name).touch()
    (folder / "notes.txt").touch()
    (folder / "elsewhere").symlink_to(tmp_path)
    last = folder / "last.ckpt"
    held = torch.load(last, weights_only=True)
    up = f"{folder}/../../victim{'.ckpt' if kind == 'file' else ''}"
    for evil in (up, str(tmp_path / "victim.ckpt"), f"{folder}/notes.txt", f"{folder}/elsewhere/victim.ckpt"):
        for state in held["callbacks"].values():
            if "best_model_path" in state:
                state |= {"before": evil, "best_model_path": evil, "kth_best_model_path": evil}
                state["best_k_models"] = {evil: torch.tensor(0.0)}
        own = folder / "evil.ckpt"  # of a run that somebody has handed on
        torch.save(held, own)
        main(["fit", "-c", str(tmp_path / "run.yaml"), "--ckpt_path", str(own), "--trainer.max_steps=2"])
        assert all((tmp_path / name).exists() for name in ("victim", "victim.ckpt", "run/notes.ckpt"))
        assert (folder / "notes.txt").exists()
        assert folder.is_dir()
        if kind == "folder":
            assert (tmp_path / "victim" / "kept").exists()
