"""An exponential moving average of the weights, for evaluation and export."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from lit_align.modules.strategy import FSDP2Strategy
from lit_align.modules.zero import ZeROStrategy


class WeightEMA(Callback):
    """Keeps an average of the trained weights; validation looks at it, and the exported folder holds it.

    After every optimizer step, of which PPO takes several on a batch, average <- d average + (1 - d) weights, with
    d = min(decay, (1 + t) / (10 + t)) at step t, so that the start is forgotten in short runs too. Training goes on
    from the weights themselves, and no gradient changes. What is frozen is not copied, and checkpoints hold the average
    beside the weights: a resumed run ends in the same average, bit by bit. (Lightning's `EMAWeightAveraging` copies the
    whole module, frozen reference and all, saves it twice, and updates once a batch.)

    `lit-align validate --ckpt_path` looks at the weights; give it the exported folder to look at the average.

    Args:
        decay: of the average at each step; 1 / (1 - decay) steps are remembered.
        device: where the average is kept, as in cpu to save the GPU's memory; null for that of the weights.
    """

    def __init__(self, decay: float = 0.999, device: str | None = None) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be in [0, 1), got {decay}")
        self.decay = decay
        self.device = device
        self.steps = 0
        self.average: dict[str, Tensor] = {}
        self._weights: dict[str, Tensor] = {}  # kept while the average is in their place
        self._hooks: list[Any] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Look at the strategy.

        Raises:
            ValueError: it keeps the weights in slices, of which a checkpoint would hold the first process's alone; or
                it steps slices, and weights change only after the optimizer's step.
        """
        if stage == "fit" and isinstance(trainer.strategy, FSDP2Strategy):
            raise ValueError("WeightEMA averages whole weights, and fsdp2 slices them: use ddp, or take WeightEMA out")
        if stage == "fit" and isinstance(trainer.strategy, ZeROStrategy):
            raise ValueError("WeightEMA averages whole weights, and zero steps slices: use ddp, or take WeightEMA out")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start from the weights as they are, or go on; and watch the optimizers.

        Raises:
            ValueError: the checkpoint's average is of other weights.
        """
        trained = _trained(pl_module)
        at_least = torch.float32  # small steps are lost in less
        average = self.average or {n: w.to(torch.promote_types(w.dtype, at_least)) for n, w in trained.items()}
        if average.keys() != trained.keys():
            raise ValueError(f"the average in the checkpoint is of {len(average)} weights, not of these {len(trained)}")
        self.average = {
            name: average[name].detach().to(self.device or weight.device, copy=True) for name, weight in trained.items()
        }
        for optimizer in trainer.optimizers:
            self._hooks.append(optimizer.register_step_post_hook(lambda *_: self._update(pl_module)))

    @torch.no_grad()
    def _update(self, module: LightningModule) -> None:
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        for name, weight in _trained(module).items():
            average = self.average[name]
            average.lerp_(weight.detach().to(average), 1.0 - decay)
        self.steps += 1

    @contextlib.contextmanager
    def applied(self, module: LightningModule) -> Iterator[None]:
        """The average in the place of the weights, until the end of the block."""
        self._swap_in(module)
        try:
            yield
        finally:
            self._swap_out(module)

    @torch.no_grad()
    def _swap_in(self, module: LightningModule) -> None:
        if self.average and not self._weights:
            for name, weight in _trained(module).items():
                self._weights[name] = weight.detach().clone()
                weight.copy_(self.average[name])

    @torch.no_grad()
    def _swap_out(self, module: LightningModule) -> None:
        for name, weight in _trained(module).items():
            if name in self._weights:
                weight.copy_(self._weights.pop(name))

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the average."""
        self._swap_in(pl_module)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Before anything is saved, the weights are back."""
        self._swap_out(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """The same, where validation is interrupted."""
        self._swap_out(pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Watch no longer."""
        while self._hooks:
            self._hooks.pop().remove()

    def state_dict(self) -> dict[str, Any]:
        """The average, and over how many steps."""
        return {"steps": self.steps, "average": self.average}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        self.steps, self.average = state_dict["steps"], state_dict["average"]


def averaged(trainer: Trainer, module: LightningModule) -> AbstractContextManager[None]:
    """What the run leaves behind in the place of what it trains: the average of a `WeightEMA`, where there is one."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, WeightEMA):
            return callback.applied(module)
    return contextlib.nullcontext()


def _trained(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
