"""Keep the configuration of a run, and hold a resumed run to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.utilities import rank_zero_info

from lit_align.callbacks.resume import config_changes, differences, settle
from lit_align.utils import secret
from lit_align.utils.disk import replacing


class SaveRunConfig(SaveConfigCallback):
    """Writes `config.yaml` into the run's folder, puts it into checkpoints, and refuses to resume with another.

    Lightning's own writes next to whatever the logger calls its folder, which two runs of a W&B project share.
    """

    def __init__(self, *args: Any, folder: str | Path, allow: frozenset[str] = frozenset(), **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "save_to_log_dir": False})
        self.folder = Path(folder)
        self.allow = allow  # kinds of change that a resumed run accepts

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Nothing yet: what the run left may belong to another configuration, and a checkpoint will say so."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write."""
        super().setup(trainer, pl_module, "fit")

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """On the first process, before anything runs."""
        with replacing(self.folder / "config.yaml") as partial:
            config = self._plain(hidden=False)
            if list(secret.found(config)):  # nor is it for others to read, should one have been overlooked
                secret.write_private(partial, yaml.safe_dump(secret.redacted(config), sort_keys=False))
            else:
                self.parser.save(self.config, str(partial), skip_unset=False, overwrite=True, multifile=False)
        for logger in trainer.loggers:
            logger.log_hyperparams({"config": self._plain()})

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Remember what the run was."""
        checkpoint["run_config"] = self._plain()

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Compare.

        Raises:
            ValueError: the configuration differs where it decides what is trained, and that kind of change is not
                allowed; names the keys.
        """
        if trainer.state.fn == "fit":
            changes = config_changes(secret.redacted(checkpoint.get("run_config", {})), self._plain())
            settle(changes, self.allow, rank_zero_info)

    def _plain(self, hidden: bool = True) -> dict[str, Any]:
        """The configuration as mappings and lists, without its secrets if they are hidden."""
        text = self.parser.dump(self.config, skip_unset=False, format="yaml")
        loaded: dict[str, Any] = yaml.safe_load(text)
        return dict(secret.redacted(loaded)) if hidden else loaded


__all__ = ["SaveRunConfig", "differences"]
