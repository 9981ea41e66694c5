"""Which weights a run leaves behind: those of the last step, or of the best by the monitored metric."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lit_align.callbacks.ema import WeightEMA, averaged
from lit_align.modules.strategy import FSDP2Strategy

Which = Literal["last", "best"]
Kept = Literal["last", "best", "checkpoint"]


class Chosen(NamedTuple):
    """The weights that are exported.

    Attributes:
        which: last, best, or any other checkpoint.
        step: optimizer step that they are of.
        steps: optimizer steps of the whole run.
        row: `step` of metrics.csv up to which its rows are of that step or earlier.
        monitor: metric that the best was chosen by.
        score: its value.
    """

    which: Kept
    step: int
    steps: int
    row: int | None = None
    monitor: str | None = None
    score: float | None = None

    def __str__(self) -> str:
        if self.which == "last":
            return f"the weights of the last optimizer step, {self.step:,}"
        if self.which == "checkpoint":
            return f"the weights of optimizer step {self.step:,} of {self.steps:,}"
        best = f"the best by {self.monitor} ({self.score:.5g})"
        return f"the weights of optimizer step {self.step:,} of {self.steps:,}, {best}"

    def told(self) -> dict[str, Any]:
        """As the exported folder carries it."""
        told = {"which": self.which, "step": self.step, "steps": self.steps}
        return told if self.monitor is None else {**told, "monitor": self.monitor, "score": self.score}


def monitored(trainer: Trainer) -> ModelCheckpoint | None:
    """The checkpoint callback that compares by a metric, if there is one."""
    keep = (callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint))
    return next((callback for callback in keep if callback.monitor is not None), None)


def wanted(trainer: Trainer) -> Which | None:
    """What the run's export callback was asked for."""
    asked = (getattr(callback, "which", None) for callback in trainer.callbacks)  # type: ignore[attr-defined]
    return next((which for which in asked if which in ("last", "best")), None)


def check_choice(trainer: Trainer, which: Which | None) -> None:
    """Refuse to export the best of a run that compares by no metric.

    Raises:
        ValueError: says what to set.
    """
    if which == "best" and monitored(trainer) is None:
        raise ValueError("export: best needs checkpoint.monitor (val/loss, for one): set it, or export: last")


@contextlib.contextmanager
def chosen(trainer: Trainer, module: LightningModule, which: Which | None) -> Iterator[Chosen]:
    """Put the weights that are exported in the place of the trained ones, until the end of the block.

    Where a `WeightEMA` averages the weights, it is the average at that step.

    Args:
        trainer: at the end of fitting.
        module: what was fitted.
        which: null for the best where a metric is monitored, else the last.
    """
    keep = monitored(trainer)
    last = Chosen("last", trainer.global_step, trainer.global_step)
    best = None if which == "last" or keep is None else _best(trainer, keep)
    if keep is None or best is None:
        if keep is not None and which != "last":
            rank_zero_info(f"{keep.monitor} was never compared: the last step is exported")
        with averaged(trainer, module):
            yield last
        return
    checkpoint, score = best
    picked = Chosen(
        "best", checkpoint["global_step"], trainer.global_step, logged_step(checkpoint), keep.monitor, score
    )
    rank_zero_info(f"exported are {picked}")
    if picked.step == picked.steps:  # and nothing is to be read
        with averaged(trainer, module):
            yield picked
        return
    with _in_place(trainer, module, _averaged_state(trainer, checkpoint)):
        yield picked


def _best(trainer: Trainer, keep: ModelCheckpoint) -> tuple[dict[str, Any], float] | None:
    path = trainer.strategy.broadcast(keep.best_model_path)
    if not path or not Path(path).exists():
        return None
    checkpoint = trainer.strategy.checkpoint_io.load_checkpoint(path, map_location="cpu", weights_only=True)
    score = keep.best_model_score
    return checkpoint, float("nan") if score is None else float(score)


def logged_step(checkpoint: Mapping[str, Any]) -> int:
    """The step of the loggers, which count batches that stepped."""
    return int(checkpoint["loops"]["fit_loop"]["epoch_loop.state_dict"]["_batches_that_stepped"])


def averaged_state(checkpoint: dict[str, Any], key: str | None = None) -> dict[str, Tensor]:
    """The weights of a checkpoint, or their average where a `WeightEMA` kept one.

    Args:
        checkpoint: as Lightning loads it.
        key: under which the callback's state lies; null for any `WeightEMA`.
    """
    states = checkpoint.get("callbacks") or {}
    keys = [name for name in states if (name == key if key else name.startswith(WeightEMA.__qualname__))]
    average: dict[str, Tensor] = states[keys[0]]["average"] if keys else {}
    state = checkpoint["state_dict"]
    return {name: average[name].to(weight.dtype) if name in average else weight for name, weight in state.items()}


def _averaged_state(trainer: Trainer, checkpoint: dict[str, Any]) -> dict[str, Tensor]:
    ema = next((c for c in trainer.callbacks if isinstance(c, WeightEMA)), None)  # type: ignore[attr-defined]
    return checkpoint["state_dict"] if ema is None else averaged_state(checkpoint, ema.state_key)


@contextlib.contextmanager
def _in_place(trainer: Trainer, module: LightningModule, state: dict[str, Tensor]) -> Iterator[None]:
    held = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    before = {name: tensor.detach().clone() for name, tensor in held.items() if name in state}
    if isinstance(trainer.strategy, FSDP2Strategy):
        trainer.strategy.load_weights(state)
    else:
        module.load_state_dict(state, strict=False)
    try:
        yield
    finally:
        with torch.no_grad():
            for name, tensor in before.items():
                held[name].copy_(tensor)
