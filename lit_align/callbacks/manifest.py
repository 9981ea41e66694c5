"""What a run was made of: versions, data, seed, and the run it continues from."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info

from lit_align.callbacks.resume import manifest_changes, settle
from lit_align.callbacks.wandb_run import known, tracked
from lit_align.data.data_module import TextDataModule
from lit_align.data.store import tokenizer_key
from lit_align.models.seal import broken_seal, file_hash, model_hash
from lit_align.utils import secret
from lit_align.utils.disk import write_whole

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


# What of it a checkpoint carries, to be compared when a run goes on.
_COMPARED = ("packages", "data", "tokenizer", "parents", "configs")


class Manifest(Callback):
    """Writes `manifest.json`: git commit, package versions, data fingerprints and counts, seed, the parents' hashes.

    Args:
        folder: the run's folder.
        seed: what seed_everything was called with.
        parents: folders of models that the run starts from.
        roles: keys of the configuration that name each of them.
        allow: kinds of change that a resumed run accepts.
    """

    def __init__(
        self,
        folder: str | Path,
        seed: int | None = None,
        parents: list[str] | None = None,
        roles: Mapping[str, list[str]] | None = None,
        allow: frozenset[str] = frozenset(),
    ) -> None:
        self.path = Path(folder) / "manifest.json"
        self.seed = seed
        self.parents = parents or []
        self.roles = {parent: list((roles or {}).get(parent, [])) for parent in self.parents}
        self.allow = allow
        self._made: dict[str, Any] | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write before training: a run that dies has one too."""
        for parent in self.parents:
            if trainer.is_global_zero and (broken := broken_seal(Path(parent))):
                rank_zero_info(f"look: {broken}")
        self._write(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the run of Weights & Biases, which has begun by now, so that a resumed run goes on in it."""
        if trainer.is_global_zero and (run := tracked(trainer.loggers)) is not None:
            self._content(trainer)["wandb"] = run
            self._write(trainer)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write."""
        self._write(trainer)

    on_test_start = on_predict_start

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write for a run that validates alone."""
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._write(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Remember what the run was made of."""
        checkpoint["run_manifest"] = {name: self._content(trainer)[name] for name in _COMPARED}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Compare, when a run goes on.

        Raises:
            ValueError: data, models or tokenizer have changed, and that kind of change is not allowed.
        """
        if trainer.state.fn == "fit":
            changes = manifest_changes(secret.redacted(checkpoint.get("run_manifest") or {}), self._content(trainer))
            settle(changes, self.allow, rank_zero_info)

    def _content(self, trainer: Trainer) -> dict[str, Any]:
        if self._made is None:
            data: Any = trainer.datamodule  # type: ignore[attr-defined]
            configs = {parent: Path(parent) / "config.json" for parent in self.parents}
            self._made = {
                **environment(),
                "seed": self.seed,
                "devices": trainer.world_size,
                "precision": trainer.precision,
                "data": getattr(data, "manifest", list)(),
                "tokenizer": tokenizer_key(data.tokenizer) if isinstance(data, TextDataModule) else None,
                "parents": {parent: model_hash(Path(parent)) for parent in self.parents},
                "configs": {parent: file_hash(file) for parent, file in configs.items() if file.exists()},
                "roles": self.roles,
            }
            if job := os.environ.get("SLURM_JOB_ID"):
                self._made["slurm_job"] = job  # that which SLURM starts again finds its folder by this
            self._made = secret.redacted(self._made)
        return self._made

    def _write(self, trainer: Trainer) -> None:
        if trainer.is_global_zero:
            if trainer.ckpt_path is not None and (run := known(self.path)) is not None:
                self._content(trainer).setdefault("wandb", run)
            write_whole(self.path, json.dumps(self._content(trainer), indent=2, default=str) + "\n")


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
