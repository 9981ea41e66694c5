"""Leave the trained model behind as a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lit_align.models.export import export
from lit_align.models.sharding import is_sharded


class HFExport(Callback):
    """At the end of fitting, writes weights, tokenizer and chat template to `folder`.

    The tokenizer is the data module's, as it was used: with the chat template that the model was trained on, and the
    tokens that end an answer as stop tokens of the generation configuration.

    Args:
        folder: where to.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Export, on the first process, or on all where each has a slice of the model."""
        exported = getattr(pl_module, "exported", None)
        if exported is None or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        if not trainer.is_global_zero and not is_sharded(pl_module):
            return
        datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
        tokenizer = getattr(datamodule, "tokenizer", None) or getattr(pl_module, "tokenizer", None)
        export(exported(), tokenizer, self.folder, getattr(datamodule, "stop_ids", ()))
