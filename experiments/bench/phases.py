"""Where the time of an iteration of PPO goes: the share of each of its phases, for `ours.py ppo ... phases=true`."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from lit_align.models.scalar import Scorer
from lit_align.modules.ppo import PPOModule

# By the method that does it, in the order of an iteration.
PHASES = {
    "training_step": "iteration",
    "answer": "sampling",
    "score": "scoring",
    "shaped_scores": "reward",
    "reference_logps": "reference",
    "update": "epochs",
    "policy": "policy",
    "value": "value",
    "manual_backward": "backward",
    "step": "optimizer",
}


class Phases(Callback):
    """Seconds of each phase, without those of the phases inside it; the first iteration is left out.

    The module's methods are wrapped where the module is, and nothing of the package is changed. A phase is known by
    where it happens: the policy's forward is one in scoring and another in the epochs.
    """

    def __init__(self) -> None:
        self.seconds: dict[tuple[str, ...], float] = defaultdict(float)
        self.running: list[str] = []
        self.since = 0.0

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Wrap, now that the models are there."""
        assert isinstance(module, PPOModule), "phases are PPO's"
        for name in PHASES:
            if hasattr(type(module), name):
                self._wrap(module, name, PHASES[name])
        self._wrap(module.policy, "forward", PHASES["policy"])
        if module.value is not None:
            self._wrap(module.value, "values" if isinstance(module.value, Scorer) else "forward", PHASES["value"])

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *call: Any) -> None:
        """Forget the first iteration."""
        if call[-1] == 0:
            self.seconds.clear()

    def _wrap(self, owner: Any, name: str, phase: str) -> None:
        method: Callable[..., Any] = getattr(owner, name)

        def timed(*call: Any, **options: Any) -> Any:
            self._until_now()
            self.running.append(phase)
            result = method(*call, **options)
            self._until_now()
            self.running.pop()
            return result

        setattr(owner, name, timed)

    def _until_now(self) -> None:
        """What has gone by belongs to the phase that was running."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        if self.running:
            self.seconds[tuple(self.running)] += now - self.since
        self.since = now

    def __str__(self) -> str:
        """A line for each phase: its share, without those of the lines indented below it."""
        total, order = sum(self.seconds.values()), list(PHASES.values())
        lines = [
            f"{self.seconds[path] / total:6.1%}  {'  ' * (len(path) - 1)}{path[-1]}"
            for path in sorted(self.seconds, key=lambda path: [order.index(phase) for phase in path])
        ]
        return "\n".join(lines)
