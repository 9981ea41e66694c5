"""Checkpoints to resume from."""

from __future__ import annotations

import contextlib
import copy
import os
import shutil
import signal
import time
import weakref
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lit_align.callbacks.divergence import DivergenceGuard
from lit_align.callbacks.metrics_csv import log_ahead, log_now, pending
from lit_align.callbacks.preemption import Preempted, StopRequest, unchanged
from lit_align.utils.disk import replacing

# Beside last.ckpt, with a monitor: a link to the best.
BEST = "best.ckpt"


class RunCheckpoint(ModelCheckpoint):
    """Saves after each validation, after the last batch of an epoch that has none, and at the end of training.

    Options, file names and the place in the Trainer are Lightning's; when and in which order to save is written here.
    Lightning saves at the end of epochs, and 2.6 resumes badly from there: it counts the last batch again, so that
    every later step in the logs is one too high, and with max_epochs and max_steps given it ends an epoch early. A
    validation that interrupts an accumulation of gradients is passed over.

    A run that dies at any moment leaves a checkpoint under the name of the last one, and goes on from it to the bit.
    On SIGTERM, and on SLURM's signal before the time is up, it saves after the batch or the validation that it is in.

    With a `monitor`, `last.ckpt` is of the last step and `best.ckpt` is a link to the best by that metric. A metric of
    validation (`val/...`) is compared after each validation alone: between two, it is of other weights.

    Args:
        dirpath: folder of the checkpoints.
        filename: their name, as in {epoch}-{step}; metrics can be named in it.
        monitor: metric that the best checkpoints are chosen by; null keeps the newest.
        verbose: log which checkpoint is among the best.
        save_last: name the newest last.ckpt: link for a link to it, true for a file of its own.
        save_top_k: how many of the best are kept, -1 for all; without a monitor 1 (the newest), 0 or -1.
        save_on_exception: save when an error ends the run, if no accumulation of gradients is under way.
        save_weights_only: leave out the optimizer: such a checkpoint can be exported, and no run can go on from it.
        mode: min or max: which value of the metric is the best.
        auto_insert_metric_name: write step=5 for {step} in a name, not 5.
        every_n_train_steps: optimizer steps between two checkpoints.
        train_time_interval: time between two checkpoints.
        every_n_epochs: epochs between two checkpoints.
        save_on_train_epoch_end: save at the end of an epoch, not after its validation.
        enable_version_counter: do not write over a file of the same name: give the new one a number.
    """

    def __init__(
        self,
        dirpath: str | Path | None = None,
        filename: str | None = None,
        monitor: str | None = None,
        verbose: bool = False,
        save_last: bool | Literal["link"] | None = None,
        save_top_k: int = 1,
        save_on_exception: bool = False,
        save_weights_only: bool = False,
        mode: str = "min",
        auto_insert_metric_name: bool = True,
        every_n_train_steps: int | None = None,
        train_time_interval: timedelta | None = None,
        every_n_epochs: int | None = None,
        save_on_train_epoch_end: bool | None = None,
        enable_version_counter: bool = True,
    ) -> None:
        super().__init__(
            dirpath, filename, monitor, verbose, save_last, save_top_k, save_on_exception, save_weights_only, mode,
            auto_insert_metric_name, every_n_train_steps, train_time_interval, every_n_epochs, save_on_train_epoch_end,
            enable_version_counter,
        )  # fmt: skip
        self.every_n_train_steps = every_n_train_steps or 0
        self.train_time_interval = train_time_interval
        self.save_on_train_epoch_end = bool(save_on_train_epoch_end)
        self.enable_version_counter = enable_version_counter
        self._stop = StopRequest()
        self._clock = time.monotonic()  # of the last save that `train_time_interval` asked for
        self._saved: tuple[int, str] = (0, "")  # optimizer step and path of the last save
        self._deferred = False  # a save was due, and a validation comes first
        self._point: dict[str, Any] | None = None  # see `_remember_point`
        self._at_point = False  # what is saved now is of that point
        self._before = ""  # the checkpoint that the latest takes the place of

    # When.

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Clear away what a killed run left half done."""
        super().on_fit_start(trainer, pl_module)
        if trainer.is_global_zero and self.dirpath is not None and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            for partial in Path(self.dirpath).glob(".*.ckpt.partial"):
                partial.unlink()
            kept = {*self.best_k_models, self.best_model_path, str(trainer.ckpt_path)}
            if self._before not in {"", *kept} and self._may_remove(trainer, self._before, ""):
                trainer.strategy.remove_checkpoint(self._before)
        self._before = "" if self.monitor is not None else self.best_model_path

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen for signals."""
        self._clock = time.monotonic()
        early = trainer.received_sigterm  # Lightning would leave as a run that is done
        self._stop.listen(trainer)
        if early:
            self._stop.received = signal.SIGTERM
            if trainer.world_size == 1:
                rank_zero_info("asked to stop before the first step: nothing new is to be saved")
                raise Preempted

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Save what is due, where no validation comes first."""
        loop = trainer.fit_loop
        # Private, because only Lightning knows whether it validates now (by batches, epochs or time), and a run that
        # goes on from before a validation would not catch up on it.
        validates = loop.epoch_loop._should_check_val_fx(loop._data_fetcher)  # type: ignore[arg-type]
        due = self._due(trainer)
        if validates:
            self._deferred |= due and self._may_save(trainer)
            return
        log_ahead(trainer)
        if due or (trainer.is_last_batch and not sum(trainer.num_val_batches) and self._epoch_due(trainer)):
            self._save(trainer, compared=not self._validated)
        self._leave_if_asked(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save, unless that waits for the end of the epoch."""
        # A metric of validation is new now, whatever the interval of saves between validations.
        new = self._validated and self.every_n_train_steps > 0
        due = self._deferred or (not self.save_on_train_epoch_end and (new or self._epoch_due(trainer)))
        later = self.save_on_train_epoch_end and trainer.is_last_batch and self._epoch_due(trainer)
        if self._may_save(trainer) and not later and (due or self.monitor is not None):
            self._save(trainer, compared=due)
            self._deferred = False
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._leave_if_asked(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save here if that was asked for."""
        if self.save_on_train_epoch_end and self._epoch_due(trainer):
            self._save(trainer, compared=True)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the last steps too, where Lightning's is content with any earlier checkpoint."""
        if self.save_last:
            self._save(trainer)
        self._stop.rest()
        if self._stop.received is not None and trainer.world_size == 1:
            rank_zero_info("asked to stop: training is done and saved; --ckpt_path last exports the model")
            raise Preempted(self._stop.number)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save, if a signal came while nothing changed that a checkpoint holds: see `StopRequest`."""
        if not (isinstance(exception, Preempted) and unchanged(pl_module)):
            if self.save_on_exception:
                self._save(trainer)
            return
        if self._point is None:
            rank_zero_info("asked to stop in the first batch: there is nothing to save")
        else:
            last, step = self._last_path(trainer), trainer.global_step
            with _random_state(trainer, self._point["random"]):
                self._at_point = True
                self._write(trainer, last)
            rank_zero_info(
                f"asked to stop: optimizer step {step} is in {last}, without the batch that was begun; go on with "
                "--ckpt_path last"
            )
        self._stop.requeue(trainer)

    @property
    def _validated(self) -> bool:
        """Whether the monitored metric is one of validation."""
        return self.monitor is not None and self.monitor.startswith("val")

    def _due(self, trainer: Trainer) -> bool:
        """Whether a save between validations is due, by steps or by time."""
        if self.every_n_train_steps > 0 and trainer.global_step % self.every_n_train_steps == 0:
            return True
        if self.train_time_interval is None:
            return False
        now = time.monotonic()
        waited = now - self._clock >= self.train_time_interval.total_seconds()
        if due := bool(trainer.strategy.broadcast(waited)):  # the first process's clock counts
            self._clock = now
        return due

    def _epoch_due(self, trainer: Trainer) -> bool:
        every = self.every_n_epochs or 0
        return every > 0 and (trainer.current_epoch + 1) % every == 0

    def _may_save(self, trainer: Trainer) -> bool:
        """Whether there is something new, and a moment to go on from."""
        fitting = trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking
        new = self._saved[0] != trainer.global_step
        return fitting and new and not trainer.fast_dev_run and not pending(trainer)  # type: ignore[attr-defined]

    def _leave_if_asked(self, trainer: Trainer) -> None:
        if not self._stop.made(trainer) or pending(trainer):
            self._remember_point(trainer)
            return
        self._save(trainer)
        if self._may_save(trainer):  # what is kept is chosen by a metric
            self._write(trainer, self._last_path(trainer))
        if trainer.training:  # and not in a validation
            log_now(trainer)
        self._stop.leave(trainer, self._last_path(trainer) if self.save_last else self._saved[1])

    # A signal in the middle of a batch: what was true before it.

    def _remember_point(self, trainer: Trainer) -> None:
        """Keep what a checkpoint says of progress, data and random generators, which the next batch changes early."""
        if trainer.world_size > 1 or not hasattr(trainer.lightning_module, "unchanged"):
            return
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        loops = {f"{name}_loop": getattr(trainer, f"{name}_loop") for name in ("fit", "validate", "test", "predict")}
        self._point = {
            "loops": copy.deepcopy({name: loop.state_dict() for name, loop in loops.items()}),
            "data": None if data is None else copy.deepcopy(data.state_dict()),
            "random": _get_random_state(trainer),
        }

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Put in what was remembered, if this is saved in the middle of a batch."""
        if self._at_point and self._point is not None:
            checkpoint["loops"] = self._point["loops"]
            if self._point["data"]:
                checkpoint[type(trainer.datamodule).__qualname__] = self._point["data"]  # type: ignore[attr-defined]

    # How: whatever the moment of a kill, the name of the last checkpoint leads to a whole one.

    def _save(self, trainer: Trainer, compared: bool = False) -> None:
        """Save the last step; and, with a monitor, among the best if it is `compared`."""
        if not self._may_save(trainer):
            return
        metrics = self._metrics(trainer)
        replaced = ""
        if self.save_top_k != 0:
            if self.monitor is None:
                replaced = self._save_newest(trainer, metrics)
            elif compared and self.monitor in metrics and self.check_monitor_top_k(trainer, metrics[self.monitor]):
                replaced = self._save_among_best(trainer, metrics, metrics[self.monitor])
        outdated = [(replaced, self._saved[1])]
        if self.save_last:
            before, self.last_model_path = self.last_model_path, self._last_path(trainer)
            if self.save_last == "link" and self._saved[0] == trainer.global_step and self.save_top_k != 0:
                self._link(trainer, self._saved[1], self.last_model_path)
            else:
                self._write(trainer, self.last_model_path)
            outdated.append((before, self.last_model_path))
        if self.monitor is not None and self.best_model_path:
            self._link(trainer, self.best_model_path, str(Path(self.best_model_path).parent / BEST))
        for old, new in outdated:  # only now, as the links lead elsewhere
            if old and self._may_remove(trainer, old, new):
                trainer.strategy.remove_checkpoint(old)

    def _save_newest(self, trainer: Trainer, metrics: dict[str, Tensor]) -> str:
        """Save; returns the checkpoint that it takes the place of."""
        self._before = before = self.best_model_path
        # Set before saving, as it is part of the checkpoint.
        self.best_model_path = self._free_path(trainer, metrics, None, before)
        self._write(trainer, self.best_model_path)
        return before if self.save_top_k == 1 else ""

    def _save_among_best(self, trainer: Trainer, metrics: dict[str, Tensor], score: Tensor) -> str:
        """Save, and count it among the best; returns the checkpoint that it takes the place of."""
        self._before = replaced = self.kth_best_model_path if len(self.best_k_models) == self.save_top_k else ""
        self.best_k_models.pop(replaced, None)
        if score.isnan():
            score = torch.full_like(score, float("inf") if self.mode == "min" else -float("inf"))
        path = self._free_path(trainer, metrics, None, replaced)
        self.current_score = self.best_k_models[path] = score
        worst, best = (max, min) if self.mode == "min" else (min, max)
        if len(self.best_k_models) == self.save_top_k:
            self.kth_best_model_path = worst(self.best_k_models, key=lambda key: float(self.best_k_models[key]))
            self.kth_value = self.best_k_models[self.kth_best_model_path]
        self.best_model_path = best(self.best_k_models, key=lambda key: float(self.best_k_models[key]))
        self.best_model_score = self.best_k_models[self.best_model_path]
        if self.verbose:
            rank_zero_info(f"step {trainer.global_step}: {self.monitor} is {float(score):.5g}, saved in {path}")
        self._write(trainer, path)
        return replaced

    def _write(self, trainer: Trainer, path: str) -> None:
        if self.save_weights_only:  # then Lightning asks no callback
            for callback in trainer.callbacks:  # type: ignore[attr-defined]
                if isinstance(callback, DivergenceGuard):
                    callback.on_save_checkpoint(trainer, trainer.lightning_module, {})
        trainer.save_checkpoint(path, self.save_weights_only)
        self._saved = (trainer.global_step, path)
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.after_save_checkpoint(weakref.proxy(self))

    def _metrics(self, trainer: Trainer) -> dict[str, Tensor]:
        """What file names and the monitor can name."""
        counts = {"epoch": trainer.current_epoch, "step": trainer.global_step}
        metrics = {name: value.detach().clone() for name, value in trainer.callback_metrics.items()}
        return {**metrics, **{name: torch.tensor(count) for name, count in counts.items()}}

    def _last_path(self, trainer: Trainer) -> str:
        return self._free_path(trainer, self._metrics(trainer), self.CHECKPOINT_NAME_LAST, self.last_model_path)

    def _free_path(self, trainer: Trainer, metrics: dict[str, Tensor], name: str | None, own: str) -> str:
        """A path that no other file has, if versions are counted; `own` may be written over."""
        path, version = str(self.format_checkpoint_name(metrics, name)), self.STARTING_VERSION
        while self.enable_version_counter and path != own and self.file_exists(path, trainer):
            path, version = str(self.format_checkpoint_name(metrics, name, ver=version)), version + 1
        return path

    def _link(self, trainer: Trainer, path: str, link: str) -> None:
        """Have a name lead to a checkpoint, without a moment in which it leads nowhere."""
        if trainer.is_global_zero and os.path.abspath(path) != os.path.abspath(link):
            with replacing(Path(link)) as partial:
                partial.unlink(missing_ok=True)
                try:
                    partial.symlink_to(os.path.relpath(path, os.path.dirname(link)))
                except OSError:  # a file system without links
                    shutil.copy(path, partial)
        trainer.strategy.barrier()

    def _may_remove(self, trainer: Trainer, path: str, current: str) -> bool:
        """Never what is no checkpoint of this folder: a checkpoint file says which others to remove."""
        place = Path(path)
        inside = path.startswith(f"{self.dirpath}/") and ".." not in place.parts
        if inside and place.parent.exists():  # and through no link that leads elsewhere
            inside = place.parent.resolve().is_relative_to(Path(str(self.dirpath)).resolve())
        resumed = trainer.ckpt_path is not None and place.absolute() == Path(trainer.ckpt_path).absolute()
        return inside and place.suffix == self.FILE_EXTENSION and path != current and not resumed

    # Resume.

    # Private, because nothing else answers `Trainer.fit(ckpt_path="last")`.
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
            self._link(trainer, str(newest), last)
            return {last}
        return set()

    def state_dict(self) -> dict[str, Any]:
        """Lightning's, and the checkpoint to remove should the run be killed before it does."""
        return {**super().state_dict(), "before": self._before}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there, in the folder where the run lies now."""
        state_dict = _moved(state_dict, self.dirpath)
        super().load_state_dict(state_dict)
        self._before = state_dict.get("before", "")


def _get_random_state(trainer: Trainer) -> dict[str, Tensor]:
    device = trainer.strategy.root_device
    cuda = {"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {}
    return {"cpu": torch.get_rng_state(), **cuda}


@contextlib.contextmanager
def _random_state(trainer: Trainer, state: dict[str, Tensor]) -> Iterator[None]:
    """Put generators back to a state, which a checkpoint then holds, until the end of the block."""
    now = _get_random_state(trainer)
    _set_random_state(trainer, state)
    try:
        yield
    finally:
        _set_random_state(trainer, now)


def _set_random_state(trainer: Trainer, state: dict[str, Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], trainer.strategy.root_device)


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
