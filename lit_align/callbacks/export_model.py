"""Leave the trained model behind as a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lit_align.callbacks.card import model_card
from lit_align.callbacks.chosen import Which, check_choice, chosen
from lit_align.callbacks.divergence import check_weights
from lit_align.callbacks.normalize import rescale
from lit_align.models.export import export
from lit_align.models.sharding import is_sharded
from lit_align.utils.owned import check_replaceable


class HFExport(Callback):
    """At the end of fitting, writes weights, tokenizer, chat template and a model card to `folder`.

    The tokenizer is the data module's, as it was used: with the chat template that the model was trained on, and the
    tokens that end an answer as stop tokens of the generation configuration. With `lora: {export: adapter}` of the
    network the adapter stands in place of the weights. Where a `WeightEMA` averaged the weights, it is the average.

    Args:
        folder: where to.
        run: folder with config.yaml, manifest.json and metrics.csv, for the card.
        which: weights of the last step, or of the best by `checkpoint.monitor`; null for the best where a metric is
            monitored, else the last.
    """

    def __init__(self, folder: str | Path, run: str | Path | None = None, which: Which | None = None) -> None:
        self.folder = Path(folder)
        self.run = None if run is None else Path(run)
        self.which = which

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a choice that cannot be made, and a folder that is not an export's to replace.

        Raises:
            FileExistsError: the folder holds files that no export wrote.
            ValueError: the best is asked for, and no metric is monitored.
        """
        if stage == "fit":
            check_choice(trainer, self.which)
            if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
                check_replaceable(self.folder)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Export, on the first process, or on all where each has a slice of the model.

        Raises:
            Diverged: weights are not finite.
        """
        exported = getattr(pl_module, "exported", None)
        if exported is None or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
        own = getattr(datamodule, "tokenizer", None) or getattr(pl_module, "tokenizer", None)
        tokenizer = getattr(datamodule, "exported_tokenizer", own)
        lora = getattr(getattr(pl_module, "network", None), "lora", None)
        with chosen(trainer, pl_module, self.which) as picked:
            check_weights(trainer, pl_module)
            rescale(trainer, pl_module)
            if not trainer.is_global_zero and not is_sharded(pl_module):
                return
            export(
                exported(),
                tokenizer,
                self.folder,
                getattr(datamodule, "stop_ids", ()),
                adapter=lora is not None and lora.export == "adapter",
                card=model_card(trainer, pl_module, self.run, (self.run or self.folder).resolve().name, picked),
                told=picked.told(),
            )
