"""Checkpoints to resume from."""

from __future__ import annotations

import copy
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lit_align.callbacks.divergence import DivergenceGuard
from lit_align.callbacks.metrics_csv import log_ahead
from lit_align.callbacks.preemption import Preempted, StopRequest, unchanged
from lit_align.utils.disk import replacing

# Beside last.ckpt, with a monitor: a link to the best.
BEST = "best.ckpt"


class RunCheckpoint(ModelCheckpoint):
    """Saves after each validation, after the last batch of an epoch that has none, and at the end of training.

    A validation that interrupts an accumulation of gradients is passed over.
    Lightning's own saves at the end of epochs, and 2.6 resumes badly from there: it counts the last batch again, so
    that every later step in the logs is one too high, and with max_epochs and max_steps given it ends an epoch early.

    A run that dies at any moment leaves a checkpoint under the name of the last one, and goes on from it to the bit.
    On SIGTERM, and on SLURM's signal before the time is up, it saves after the batch or the validation that it is in.

    With a `monitor`, `last.ckpt` is of the last step and `best.ckpt` is a link to the best by that metric. A metric of
    validation (`val/...`) is compared after each validation alone: between two, it is of other weights.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._stop = StopRequest()
        self._replaced: list[str] = []  # checkpoints to remove when the last one has its name
        self._point: dict[str, Any] | None = None  # see `_remember_point`
        self._before = ""  # the one that the latest takes the place of

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Clear away what a killed run left half done."""
        super().on_fit_start(trainer, pl_module)
        if trainer.is_global_zero and self.dirpath is not None and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            for partial in Path(self.dirpath).glob(".*.ckpt.partial"):
                partial.unlink()
            kept = {*self.best_k_models, self.best_model_path, str(trainer.ckpt_path)}
            if self._before not in {"", *kept} and self._should_remove_checkpoint(trainer, self._before, ""):
                super()._remove_checkpoint(trainer, self._before)
        self._before = "" if self.monitor is not None else self.best_model_path

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen for signals."""
        super().on_train_start(trainer, pl_module)
        early = trainer.received_sigterm  # Lightning would leave as a run that is done
        self._stop.listen(trainer)
        if early:
            self._stop.received = signal.SIGTERM
            if trainer.world_size == 1:
                rank_zero_info("asked to stop before the first step: nothing new is to be saved")
                raise Preempted

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Save where no validation will."""
        loop = trainer.fit_loop
        # A run that goes on from before a validation would not catch up on it.
        validates = loop.epoch_loop._should_check_val_fx(loop._data_fetcher)  # type: ignore[arg-type]
        after_validation = self.monitor is None or self._validated
        if after_validation and validates:
            self._defer_save_until_validation |= self._due(trainer) and not self._should_skip_saving_checkpoint(trainer)
            return
        log_ahead(trainer)
        if self._validated:
            if self._due(trainer):
                self._save(trainer)
        else:
            super().on_train_batch_end(trainer, pl_module, *args)
        epoch = trainer.current_epoch + 1
        due = trainer.is_last_batch and self._every_n_epochs > 0 and epoch % self._every_n_epochs == 0
        if due and not sum(trainer.num_val_batches):
            self._save(trainer, compared=not self._validated)
        if not validates:
            self._leave_if_asked(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save."""
        # A metric of validation is new now, whatever the interval of saves between validations.
        self._defer_save_until_validation |= self._validated and self._every_n_train_steps > 0
        super().on_validation_end(trainer, pl_module)
        if self.monitor is not None:
            self._save(trainer)
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._leave_if_asked(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the last steps too, where Lightning's is content with any earlier checkpoint."""
        if self.save_last:
            self._save(trainer)
        super().on_train_end(trainer, pl_module)
        self._stop.rest()
        if self._stop.received is not None and trainer.world_size == 1:
            rank_zero_info("asked to stop: training is done and saved; --ckpt_path last exports the model")
            raise Preempted(self._stop.number)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save, if a signal came while nothing changed that a checkpoint holds: see `StopRequest`."""
        if not (isinstance(exception, Preempted) and unchanged(pl_module)):
            super().on_exception(trainer, pl_module, exception)
            return
        if self._point is None:
            rank_zero_info("asked to stop in the first batch: there is nothing to save")
        else:
            last = str(self.format_checkpoint_name(self._monitor_candidates(trainer), self.CHECKPOINT_NAME_LAST))
            checkpoint = trainer._checkpoint_connector.dump_checkpoint(self.save_weights_only)
            trainer.strategy.save_checkpoint({**checkpoint, **self._point}, last)
            step = trainer.global_step
            rank_zero_info(
                f"asked to stop: optimizer step {step} is in {last}, without the batch that was begun; go on with "
                "--ckpt_path last"
            )
        self._stop.requeue(trainer)

    def _remember_point(self, trainer: Trainer) -> None:
        """Keep what a checkpoint says of progress, data and random generators, which the next batch changes early."""
        if trainer.world_size > 1 or not hasattr(trainer.lightning_module, "unchanged"):
            return
        module: Any = trainer.lightning_module
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        # Lightning's own way to these numbers; there is no public one.
        point: dict[str, Any] = {"loops": trainer._checkpoint_connector._get_loops_state_dict()}
        if data is not None and (state := data.state_dict()):
            point[type(data).__qualname__] = state
        drawn: dict[str, Any] = {"state_dict": {}}
        module.on_save_checkpoint(drawn)
        self._point = copy.deepcopy({**point, "rng": drawn["rng"]})

    def _save(self, trainer: Trainer, compared: bool = False) -> None:
        """Save the last step; and, with a monitor, among the best if it is `compared`."""
        if not self._should_skip_saving_checkpoint(trainer):
            candidates = self._monitor_candidates(trainer)
            if self.monitor is None or (compared and self.monitor in candidates):
                self._save_topk_checkpoint(trainer, candidates)
            self._save_last_checkpoint(trainer, candidates)

    @property
    def _validated(self) -> bool:
        """Whether the monitored metric is one of validation."""
        return self.monitor is not None and self.monitor.startswith("val")

    def _due(self, trainer: Trainer) -> bool:
        """Whether a save between validations is due, by steps or by time."""
        every, interval = self._every_n_train_steps, self._train_time_interval
        if every > 0 and trainer.global_step % every == 0:
            return True
        if interval is None or self.monitor is None:
            return False
        now = time.monotonic()
        waited = self._last_time_checked is not None and now - self._last_time_checked >= interval.total_seconds()
        if due := bool(trainer.strategy.broadcast(waited)):
            self._last_time_checked = now
        return due

    def _leave_if_asked(self, trainer: Trainer) -> None:
        if not self._stop.made(trainer) or _pending(trainer):
            self._remember_point(trainer)
            return
        last = str(self.format_checkpoint_name(self._monitor_candidates(trainer), self.CHECKPOINT_NAME_LAST))
        self._save(trainer)
        if not self._should_skip_saving_checkpoint(trainer):  # what is kept is chosen by a metric
            self._save_checkpoint(trainer, last)
        if trainer.training:  # and not in a validation
            trainer._logger_connector.update_train_step_metrics()
        self._stop.leave(trainer, last if self.save_last else self._last_checkpoint_saved)

    def _should_skip_saving_checkpoint(self, trainer: Trainer) -> bool:
        return _pending(trainer) or super()._should_skip_saving_checkpoint(trainer)

    def _should_save_on_train_epoch_end(self, trainer: Trainer) -> bool:
        return bool(self._save_on_train_epoch_end)

    # Whatever the moment of a kill, the name of the last checkpoint leads to a whole one.

    def _save_none_monitor_checkpoint(self, trainer: Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        self._before = self.best_model_path
        super()._save_none_monitor_checkpoint(trainer, monitor_candidates)

    def _save_monitor_checkpoint(self, trainer: Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        full = len(self.best_k_models) == self.save_top_k
        self._before = self.kth_best_model_path if full else ""
        super()._save_monitor_checkpoint(trainer, monitor_candidates)

    def _save_last_checkpoint(self, trainer: Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        if self.monitor is not None and self.save_last == "link":
            self._save_last_of_monitored(trainer, monitor_candidates)
        else:
            super()._save_last_checkpoint(trainer, monitor_candidates)
        if self.monitor is not None and self.best_model_path:
            self._link_checkpoint(trainer, self.best_model_path, str(Path(self.best_model_path).parent / BEST))
        while self._replaced:
            super()._remove_checkpoint(trainer, self._replaced.pop())

    def _save_last_of_monitored(self, trainer: Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        """A link to what this step has just saved among the best, or a file of its own."""
        last = self.format_checkpoint_name(monitor_candidates, self.CHECKPOINT_NAME_LAST)
        self.last_model_path = last
        if self._last_global_step_saved != trainer.global_step:
            self._save_checkpoint(trainer, last)
        elif self._last_checkpoint_saved != last:
            self._link_checkpoint(trainer, self._last_checkpoint_saved, last)

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        if self.save_weights_only:  # then Lightning asks no callback
            for callback in trainer.callbacks:  # type: ignore[attr-defined]
                if isinstance(callback, DivergenceGuard):
                    callback.on_save_checkpoint(trainer, trainer.lightning_module, {})
        super()._save_checkpoint(trainer, filepath)

    def _remove_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        # Lightning's removes the older one before the link to it leads to the new one.
        self._replaced.append(filepath)

    @staticmethod
    def _link_checkpoint(trainer: Trainer, filepath: str, linkpath: str) -> None:
        """Lightning's, which removes the link before it makes the new one, without the moment between."""
        if trainer.is_global_zero and os.path.abspath(filepath) != os.path.abspath(linkpath):
            with replacing(Path(linkpath)) as partial:
                partial.unlink(missing_ok=True)
                try:
                    partial.symlink_to(os.path.relpath(filepath, os.path.dirname(linkpath)))
                except OSError:  # a file system without links
                    shutil.copy(filepath, partial)
        trainer.strategy.barrier()

    def _find_last_checkpoints(self, trainer: Trainer) -> set[str]:
        """Lightning's; the newest where none has the name: a run was killed between its first checkpoint and the link.

        Raises:
            ValueError: the name leads to a file that is gone, and there is no other: Lightning would begin anew.
        """
        found: set[str] = super()._find_last_checkpoints(trainer)
        there = {path for path in found if os.path.exists(path)}
        if there or self.dirpath is None:
            return there
        others = [path for path in Path(self.dirpath).glob("*.ckpt") if path.exists() and path.name != BEST]
        if found and not others:
            raise ValueError(f"{min(found)} leads to a file that is gone: remove it to begin anew")
        if others:
            newest = max(others, key=lambda path: path.stat().st_mtime)
            rank_zero_info(f"there is no last.ckpt in {self.dirpath}: goes on from {newest.name}, the newest there")
            last = str(Path(self.dirpath) / f"{self.CHECKPOINT_NAME_LAST}{self.FILE_EXTENSION}")
            self._link_checkpoint(trainer, str(newest), last)
            return {last}
        return set()

    def state_dict(self) -> dict[str, Any]:
        """Lightning's, and the checkpoint to remove should the run be killed before it does."""
        return {**super().state_dict(), "before": self._before}

    def _should_remove_checkpoint(self, trainer: Trainer, previous: str, current: str) -> bool:
        """Lightning's; never what is no checkpoint of this folder: a checkpoint file says which others to remove."""
        place = Path(previous)
        inside = str(previous).startswith(f"{self.dirpath}/") and ".." not in place.parts
        if inside and place.parent.exists():  # and through no link that leads elsewhere
            inside = place.parent.resolve().is_relative_to(Path(str(self.dirpath)).resolve())
        own = inside and place.suffix == self.FILE_EXTENSION
        return own and super()._should_remove_checkpoint(trainer, previous, current)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there, in the folder where the run lies now."""
        state_dict = _moved(state_dict, self.dirpath)
        super().load_state_dict(state_dict)
        self._before = state_dict.get("before", "")


def _moved(state: dict[str, Any], folder: Any) -> dict[str, Any]:
    """A checkpoint callback's state whose files lie in another folder now, as after a run was moved or renamed."""
    before = state.get("dirpath")
    if folder is None or before is None or str(before) == str(folder):
        return state

    def here(path: str) -> str:
        moved = Path(folder) / Path(path).name
        return str(moved) if path and Path(path).parent == Path(before) and moved.exists() else path

    kept = {here(path): score for path, score in state["best_k_models"].items() if Path(here(path)).exists()}
    paths = ("best_model_path", "kth_best_model_path", "last_model_path", "before")
    return {**state, **{key: here(state.get(key, "")) for key in paths}, "best_k_models": kept, "dirpath": folder}


def _pending(trainer: Trainer) -> bool:
    """Whether an accumulation is on: its gradients are in no checkpoint, and a resumed run would step without them."""
    batches = trainer.fit_loop.epoch_loop.batch_progress.current.ready
    return bool(batches % trainer.accumulate_grad_batches != 0 and not trainer.is_last_batch)
