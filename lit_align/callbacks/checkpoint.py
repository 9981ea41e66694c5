"""Checkpoints to resume from."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint


class RunCheckpoint(ModelCheckpoint):
    """Saves after each validation, after the last batch of an epoch that has none, and at the end of training.

    A validation that interrupts an accumulation of gradients is passed over.
    Lightning's own saves at the end of epochs, and 2.6 resumes badly from there: it counts the last batch again, so
    that every later step in the logs is one too high, and with max_epochs and max_steps given it ends an epoch early.
    """

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Save where no validation will."""
        super().on_train_batch_end(trainer, pl_module, *args)
        epoch = trainer.current_epoch + 1
        due = trainer.is_last_batch and self._every_n_epochs > 0 and epoch % self._every_n_epochs == 0
        if due and not sum(trainer.num_val_batches):
            self._save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the last steps too, where Lightning's is content with any earlier checkpoint."""
        if self.save_last:
            self._save(trainer)
        super().on_train_end(trainer, pl_module)

    def _save(self, trainer: Trainer) -> None:
        if self.monitor is None and not self._should_skip_saving_checkpoint(trainer):
            candidates = self._monitor_candidates(trainer)
            self._save_topk_checkpoint(trainer, candidates)
            self._save_last_checkpoint(trainer, candidates)

    def _should_skip_saving_checkpoint(self, trainer: Trainer) -> bool:
        # In the middle of an accumulation the gradients so far are in no checkpoint: a run that was resumed from one
        # would step without them.
        batches = trainer.fit_loop.epoch_loop.batch_progress.current.ready
        pending = batches % trainer.accumulate_grad_batches != 0 and not trainer.is_last_batch
        return pending or super()._should_skip_saving_checkpoint(trainer)

    def _should_save_on_train_epoch_end(self, trainer: Trainer) -> bool:
        return bool(self._save_on_train_epoch_end)
