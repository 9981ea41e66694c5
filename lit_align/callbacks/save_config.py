"""Keep the configuration of a run, and hold a resumed run to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback

from lit_align.disk import replacing


class SaveRunConfig(SaveConfigCallback):
    """Writes `config.yaml` into the run's folder, puts it into checkpoints, and refuses to resume with another.

    Lightning's own writes next to whatever the logger calls its folder, which two runs of a W&B project share.
    """

    def __init__(self, *args: Any, folder: str | Path, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "save_to_log_dir": False})
        self.folder = Path(folder)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Nothing yet: what the run left may belong to another configuration, and a checkpoint will say so."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write."""
        super().setup(trainer, pl_module, "fit")

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """On the first process, before anything runs."""
        with replacing(self.folder / "config.yaml") as partial:
            self.parser.save(self.config, str(partial), skip_unset=False, overwrite=True, multifile=False)
        for logger in trainer.loggers:
            logger.log_hyperparams({"config": self._plain()})

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Remember what the run was."""
        checkpoint["run_config"] = self._plain()

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Compare.

        Raises:
            ValueError: the configuration differs where it decides what is trained; names the keys.
        """
        differing = differences(checkpoint.get("run_config", {}), self._plain())
        if differing and trainer.state.fn == "fit":
            raise ValueError(
                f"the checkpoint belongs to a run with another {differing[0]}: resuming takes a run up as it was. "
                "Restore the value, or start a new run from the exported folder without --ckpt_path"
            )

    def _plain(self) -> dict[str, Any]:
        text = self.parser.dump(self.config, skip_unset=False, format="yaml")
        loaded: dict[str, Any] = yaml.safe_load(text)
        return loaded


# What a resumed run may change: how far it goes, where it runs and writes, what it shows.
_FREE = (
    "out", "config", "ckpt_path", "weights_only", "checkpoint.",
    "data.init_args.num_workers", "data.init_args.cache_dir",
    *(f"trainer.{key}" for key in (
        "max_", "min_", "limit_val", "enable_", "logger", "accelerator", "strategy", "log_every", "profiler",
        "callbacks", "default_root", "num_sanity",
    )),
)  # fmt: skip


def differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    """Keys whose values differ, each with both values, except those that a resumed run may change."""
    if isinstance(old, dict) and isinstance(new, dict):
        return [
            line
            for key in sorted({*old, *new}, key=str)
            for line in differences(old.get(key), new.get(key), f"{prefix}.{key}" if prefix else str(key))
        ]
    if old == new or prefix.startswith(_FREE):
        return []
    return [f"{prefix} ({old!r}, now {new!r})"]
