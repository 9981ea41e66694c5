"""Combine several rewards: a weighted sum, or an ensemble of reward models."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from lit_align.functional.ensemble import mean_score, uncertainty_weighted_score, worst_case_score
from lit_align.rewards.given import as_reward
from lit_align.rewards.protocol import Reward
from lit_align.types import Rollout
from lit_align.utils.names import unseen


class CombinedReward(Reward):
    """Base of rewards that combine others.

    Args:
        rewards: the rewards to combine.
        names: names in the logs; null takes the names of functions and classes, numbered if they repeat.
    """

    def __init__(self, rewards: list[Reward], names: list[str] | None = None) -> None:
        super().__init__()
        rewards = [as_reward(reward) for reward in rewards]
        if not rewards:
            raise ValueError(f"{type(self).__name__} has 0 rewards")
        names = _numbered([reward.label for reward in rewards]) if names is None else names
        if len(set(names)) != len(rewards) or len(names) != len(rewards):
            raise ValueError(f"{type(self).__name__} has {len(rewards)} rewards and the names {', '.join(names)}")
        if hidden := [name for name in names if unseen(name)]:
            raise ValueError(f"{type(self).__name__}: the name {hidden[0]!r} holds invisible characters")
        self.rewards = nn.ModuleList(rewards)
        self.names = names
        self._said: dict[str, Tensor] = {}

    def load(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Load each reward."""
        for reward in self.rewards:
            reward.load(tokenizer)  # type: ignore[operator]

    def forward(self, rollout: Rollout) -> Tensor:
        """Shape (Q,)."""
        self._said, scores = {}, []
        for name, reward in zip(self.names, self.rewards, strict=True):
            scores.append(reward(rollout))
            self._said[name] = scores[-1]
            self._said |= {f"{name}_{inner}": part for inner, part in reward.parts().items()}  # type: ignore[operator]
        return self.combine(torch.stack(scores))

    def parts(self) -> dict[str, Tensor]:
        """Last scores of each reward, before weights."""
        return self._said

    def combine(self, score_MQ: Tensor) -> Tensor:
        """Combine the scores of the M rewards into one. Shape (Q,)."""
        raise NotImplementedError(f"{type(self).__name__} must implement combine")


class SumReward(CombinedReward):
    """Weighted sum of rewards, such as the right answer plus a little for its format.

    Args:
        rewards: the rewards to sum.
        weights: one weight per reward; null takes 1 for each.
        names: see `CombinedReward`; each reward is logged as `ppo/reward_NAME` before its weight.
    """

    def __init__(
        self, rewards: list[Reward], weights: list[float] | None = None, names: list[str] | None = None
    ) -> None:
        weights = [1.0] * len(rewards) if weights is None else weights
        if len(weights) != len(rewards):
            raise ValueError(f"SumReward has {len(rewards)} rewards and {len(weights)} weights")
        super().__init__(rewards, names)
        self.weights = weights

    def combine(self, score_MQ: Tensor) -> Tensor:
        """Shape (Q,)."""
        return torch.stack([w * score_Q for w, score_Q in zip(self.weights, score_MQ, strict=True)]).sum(0)


class EnsembleReward(CombinedReward):
    """Ensemble of reward models that differ in their seed, so that a policy that fools one does not fool all.

    Each member and the standard deviation between them are logged (`ppo/reward_NAME`, `ppo/reward_deviation`). Members
    must share a scale, as after RewardModule's `normalize` or NormalizeReward.

    Args:
        rewards: the members, usually `ModelReward`s of several folders.
        combine: mean; minimum (WCO); or uncertainty, the mean minus `coef` times the variance between them (UWO).
        coef: weight of the variance; the paper uses 0.1 in PPO and 0.5 in best-of-n.
        names: see `CombinedReward`.

    Source: Coste et al. 2023, "Reward Model Ensembles Help Mitigate Overoptimization", section 3.
    """

    def __init__(
        self,
        rewards: list[Reward],
        combine: Literal["mean", "minimum", "uncertainty"] = "uncertainty",
        coef: float = 0.1,
        names: list[str] | None = None,
    ) -> None:
        super().__init__(rewards, names)
        if len(rewards) < 2:
            raise ValueError("an ensemble needs at least two rewards")
        if combine not in ("mean", "minimum", "uncertainty"):
            raise ValueError(f"unknown combine {combine!r}: choose mean, minimum or uncertainty")
        if coef < 0:
            raise ValueError(f"coef is the price of disagreement: it must not be negative, got {coef}")
        self.how, self.coef = combine, coef

    def combine(self, score_MQ: Tensor) -> Tensor:
        """Shape (Q,)."""
        self._said["deviation"] = score_MQ.std(0, correction=0)
        if self.how == "minimum":
            return worst_case_score(score_MQ)
        return mean_score(score_MQ) if self.how == "mean" else uncertainty_weighted_score(score_MQ, self.coef)


def _numbered(names: Sequence[str]) -> list[str]:
    """The same, with _1, _2 ... after those that repeat."""
    often, seen = Counter(names), Counter[str]()
    numbered = []
    for name in names:
        seen[name] += 1
        numbered.append(f"{name}_{seen[name]}" if often[name] > 1 else name)
    return numbered
