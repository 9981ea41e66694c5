"""What a run was made of: versions, data, seed, and the run it continues from."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lit_align.disk import write_whole
from lit_align.models.seal import model_hash

PACKAGES = (
    "lit_align",
    "torch",
    "lightning",
    "transformers",
    "datasets",
    "tokenizers",
    "peft",
    "jsonargparse",
    "wandb",
)


class Manifest(Callback):
    """Writes `manifest.json`: git commit, package versions, data fingerprints and counts, seed, the parents' hashes.

    Args:
        folder: the run's folder.
        seed: what seed_everything was called with.
        parents: folders of models that the run starts from.
    """

    def __init__(self, folder: str | Path, seed: int | None = None, parents: list[str] | None = None) -> None:
        self.path = Path(folder) / "manifest.json"
        self.seed = seed
        self.parents = parents or []

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write before training: a run that dies has one too."""
        self._write(trainer)

    on_predict_start = on_fit_start

    def _write(self, trainer: Trainer) -> None:
        if not trainer.is_global_zero:
            return
        described = getattr(trainer.datamodule, "manifest", list)  # type: ignore[attr-defined]
        content = {
            **environment(),
            "seed": self.seed,
            "devices": trainer.world_size,
            "precision": trainer.precision,
            "data": described(),
            "parents": {parent: model_hash(Path(parent)) for parent in self.parents},
        }
        if job := os.environ.get("SLURM_JOB_ID"):
            content["slurm_job"] = job  # that which SLURM starts again finds its folder by this
        write_whole(self.path, json.dumps(content, indent=2, default=str) + "\n")


def environment() -> dict[str, Any]:
    """Commit of the code, versions of what it runs on."""
    versions: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return {
        "commit": _commit(),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "packages": versions,
    }


def _commit() -> str | None:
    """The commit of the source tree, if this is one; a + when it has changes."""
    here = Path(__file__).parent
    try:
        told = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--abbrev=40", "--exclude=*"],
            cwd=here, capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
        return told.stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
