"""Gold as a reward: plugged into PPO, or watched beside the reward that is trained on."""

from __future__ import annotations

from typing import Literal

from lit_align.rewards.protocol import Reward
from lit_align.sandbox.gold import judge
from lit_align.sandbox.sources import prompt_from
from lit_align.sandbox.world import World
from lit_align.types import Rollout


class GoldReward(Reward):
    """What an answer is worth in truth.

    Args:
        seed: which world.
        part: total; content alone (without the price of words and of not stopping); or correct, which is 1 or 0.
    """

    def __init__(self, seed: int = 0, part: Literal["total", "content", "correct"] = "total") -> None:
        super().__init__()
        self.world = World(seed)
        self.part = part

    def forward(self, rollout: Rollout) -> list[float]:
        """Of each answer."""
        answers = zip(rollout.rows, rollout.texts, rollout.completions, strict=True)
        judged = [judge(self.world, prompt_from(row), text, answer.finished) for row, text, answer in answers]
        return [getattr(judgement, self.part) for judgement in judged]
