"""A Python function as a reward."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from lit_align.rewards.base import Reward, checked
from lit_align.types import Rollout


class FunctionReward(Reward):
    """Scores completions by a function `f(rows, completions) -> scores`.

    Args:
        function: takes the prompts' rows (dictionaries with `prompt`, `reference` and any other column of the data)
            and the completions as text, and returns one number for each. In YAML, its import path.
    """

    def __init__(self, function: Callable[[list[dict], list[str]], list[float]]) -> None:
        super().__init__()
        self.function = function

    def forward(self, rollout: Rollout) -> Tensor:
        """Shape (Q,)."""
        name = getattr(self.function, "__name__", type(self.function).__name__)
        return checked(self.function(rollout.rows, rollout.texts), rollout, f"the reward function {name}")
