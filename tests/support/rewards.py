"""Rewards and steps for tests of what a run writes of its configuration."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from lit_align import Reward
from lit_align.types import Rollout


class Either(Reward):
    """Asks one reward and leaves the other alone."""

    def __init__(self, asked: Reward, silent: Reward) -> None:
        super().__init__()
        self.asked, self.silent = asked, silent

    def forward(self, rollout: Rollout) -> Tensor:
        """Shape (Q,)."""
        return self.asked(rollout)


class Tells:
    """A step that tells how long its secret is."""

    def __init__(self, headers: dict[str, str]) -> None:
        self.headers = headers

    def run(self, out: Path) -> dict[str, float]:
        """The length."""
        return {"length": float(len(self.headers["Authorization"]))}
