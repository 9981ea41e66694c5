"""Stop a run that has gone wrong, before its checkpoint is written over and its hours are spent."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from lit_align.models.sharding import here

NOT_FINITE = "lower the learning rate, clip gradients at a lower norm, or compute in bf16-mixed where it was fp16"


class Diverged(ValueError):
    """The run was stopped; the message says by which number, and where its last checkpoint lies."""


class DivergenceGuard(Callback):
    """Looks at what training logs after each batch, and stops at a number that no good run shows.

    A loss or a norm of gradients that is not finite stops a run in any case, as do weights that are not finite before
    a checkpoint is saved and at the end of training. That checkpoint is not written: the last one is from before. Steps
    that the scaler of fp16-mixed skips, for gradients that are infinite, are part of a good run.

    The command line adds one to each fit that names none.

    Args:
        kl: highest `ppo/kl` from the reference, in nats an answer.
        entropy: lowest `ppo/entropy`, in nats a token: below it a policy has little left to explore with.
        length: highest `ppo/length`, as a multiple of that of the first batch.
        patience: batches in a row that a limit is crossed before the run is stopped (a loss that is not finite stops
            it at once).
        finite: look for numbers that are not finite.

    Raises:
        Diverged: from the training loop.
    """

    def __init__(
        self,
        kl: float | None = None,
        entropy: float | None = None,
        length: float | None = None,
        patience: int = 1,
        finite: bool = True,
    ) -> None:
        if patience < 1:
            raise ValueError(f"patience must be at least 1, got {patience}")
        self.kl, self.entropy, self.length, self.patience = kl, entropy, length, patience
        self.finite = finite
        self.first_length: float | None = None
        self.crossed: dict[str, int] = {}
        self.looked_at = -1

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, outputs: Any = None, *call: Any) -> None:
        """Look at what the batch logged, and at its loss."""
        # Reading a figure waits for the device: once an optimizer step, not once a micro-batch.
        if self.finite and trainer.global_step != self.looked_at:
            self.looked_at = trainer.global_step
            self._look(trainer, outputs)
        if self.length is not None and self.first_length is None:
            self.first_length = _logged(trainer, "ppo/length")
        longest = None if self.length is None or self.first_length is None else self.length * self.first_length
        for name, limit, above, way_out in (
            ("ppo/kl", self.kl, True, "raise model.kl_coef, or lower the learning rate"),
            ("ppo/entropy", self.entropy, False, "raise model.clip_high or model.kl_coef, or lower the learning rate"),
            ("ppo/length", longest, True, "set model.missing_eos_penalty, or see whether the reward pays for length"),
        ):
            value = None if limit is None else _logged(trainer, name)
            if limit is None or value is None:
                continue
            outside = value > limit if above else value < limit
            self.crossed[name] = self.crossed.get(name, 0) + 1 if outside else 0
            if self.crossed[name] >= self.patience:
                side = "above" if above else "below"
                _stop(trainer, f"{name} is {value:.4g}, {side} {limit:.4g}: {way_out}")

    def _look(self, trainer: Trainer, outputs: Any) -> None:
        scaled = getattr(trainer.precision_plugin, "scaler", None) is not None or trainer.precision == "16-mixed"
        logged = {
            name: value
            for name, value in trainer.callback_metrics.items()
            if name.startswith(("train/", "ppo/"))
            and (name.endswith("loss") or (name.endswith("grad_norm") and not scaled))
        }
        # Of a module that logs no loss, the loss itself; not of several processes, of which one might stop alone.
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if isinstance(loss, Tensor) and loss.numel() == 1 and trainer.world_size == 1:
            logged.setdefault("the loss", loss.detach())
        if not logged:
            return
        # Together: each is a tensor on the device, and reading it waits for the device.
        values = torch.stack([torch.as_tensor(v).float().to(trainer.strategy.root_device) for v in logged.values()])
        for name, value in zip(logged, values.tolist(), strict=True):
            if not math.isfinite(value):
                _stop(trainer, f"{name} is {value}: {NOT_FINITE}")

    def on_save_checkpoint(self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Look at the weights before they take the place of good ones."""
        if self.finite:
            check_weights(trainer, module)

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Look at the weights of the last step, of which there may be no checkpoint."""
        if self.finite and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            check_weights(trainer, module)

    def state_dict(self) -> dict[str, Any]:
        """The length that others are compared with, and how often limits were crossed."""
        return {"first_length": self.first_length, "crossed": self.crossed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        self.first_length, self.crossed = state_dict["first_length"], state_dict["crossed"]


def check_weights(trainer: Trainer, module: LightningModule) -> None:
    """Refuse trained weights that are not finite; all processes must come here.

    Raises:
        Diverged: some are not; names the first, and the last checkpoint.
    """
    trained = {name: here(p.detach()) for name, p in module.named_parameters() if p.requires_grad}
    broken = not _all_finite(trained)
    if trainer.world_size > 1:
        broken = trainer.strategy.reduce_boolean_decision(broken, all=False)
    if broken:
        name = next((name for name, weight in trained.items() if not _all_finite({name: weight})), "on another process")
        _stop(trainer, f"weights are not finite ({name}): {NOT_FINITE}")


def _all_finite(weights: dict[str, Tensor]) -> bool:
    """Whether all are: by the largest of each, which NaN passes through, without a copy of the weights."""
    filled = [weight for weight in weights.values() if weight.numel() and weight.is_floating_point()]
    return not filled or math.isfinite(torch.nn.utils.get_total_norm(filled, math.inf).item())


def _stop(trainer: Trainer, why: str) -> None:
    last = next((path for path in _kept(trainer) if path and os.path.exists(path)), None)
    kept = f"the last checkpoint before is {last}" if last else "there is no checkpoint yet"
    raise Diverged(f"stopped at optimizer step {trainer.global_step}: {why}; {kept}")


def _kept(trainer: Trainer) -> Iterator[str]:
    for checkpoint in trainer.checkpoint_callbacks:
        yield getattr(checkpoint, "last_model_path", "")
        if folder := getattr(checkpoint, "dirpath", None):
            yield os.path.join(folder, "last.ckpt")
        yield getattr(checkpoint, "best_model_path", "")
    yield str(trainer.ckpt_path or "")


def _logged(trainer: Trainer, name: str) -> float | None:
    value = trainer.callback_metrics.get(name)
    return None if value is None else float(value)
