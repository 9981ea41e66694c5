"""Stop a run that has gone wrong, before its checkpoint is written over and its hours are spent."""

from __future__ import annotations

import math
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

NOT_FINITE = "lower the learning rate, clip gradients at a lower norm, or compute in bf16-mixed where it was fp16"


class Diverged(ValueError):
    """The run was stopped; the message says by which number, and where its last checkpoint lies."""


class DivergenceGuard(Callback):
    """Looks at what training logs after each batch, and stops at a number that no good run shows.

    A loss that is not finite stops a run in any case. The checkpoint of that batch is not written: the last one is from
    before.

    Args:
        kl: highest `ppo/kl` from the reference, in nats an answer.
        entropy: lowest `ppo/entropy`, in nats a token: below it a policy has little left to explore with.
        length: highest `ppo/length`, as a multiple of that of the first batch.
        patience: batches in a row that a limit is crossed before the run is stopped (a loss that is not finite stops
            it at once).

    Raises:
        Diverged: from the training loop.
    """

    def __init__(
        self, kl: float | None = None, entropy: float | None = None, length: float | None = None, patience: int = 1
    ) -> None:
        if patience < 1:
            raise ValueError(f"patience must be at least 1, got {patience}")
        self.kl, self.entropy, self.length, self.patience = kl, entropy, length, patience
        self.first_length: float | None = None
        self.crossed: dict[str, int] = {}

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *call: Any) -> None:
        """Look."""
        # One at a time: each is a tensor on the device, and reading it waits for the device.
        for name in ("train/loss", "ppo/policy_loss", "ppo/value_loss", "ppo/grad_norm"):
            value = _logged(trainer, name)
            if value is not None and not math.isfinite(value):
                self._stop(trainer, f"{name} is {value}: {NOT_FINITE}")
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
                self._stop(trainer, f"{name} is {value:.4g}, {side} {limit:.4g}: {way_out}")

    def _stop(self, trainer: Trainer, why: str) -> None:
        checkpoint: Any = trainer.checkpoint_callback
        last = getattr(checkpoint, "last_model_path", "") or getattr(checkpoint, "best_model_path", "")
        kept = f"the last checkpoint before is {last}" if last else "there is no checkpoint yet"
        raise Diverged(f"stopped at optimizer step {trainer.global_step}: {why}; {kept}")

    def state_dict(self) -> dict[str, Any]:
        """The length that others are compared with, and how often limits were crossed."""
        return {"first_length": self.first_length, "crossed": self.crossed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        self.first_length, self.crossed = state_dict["first_length"], state_dict["crossed"]


def _logged(trainer: Trainer, name: str) -> float | None:
    value = trainer.callback_metrics.get(name)
    return None if value is None else float(value)
