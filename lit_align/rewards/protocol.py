"""Base class of rewards: modules that score completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from lit_align.models.language import LanguageModel
from lit_align.types import Rollout


class Reward(nn.Module):
    """Base class of rewards. A user's own reward is a subclass named by class_path, or a function (`FunctionReward`).

    It is an nn.Module so that its weights move to the device of the run. They are frozen and never saved in
    checkpoints.
    """

    def attach(self, policy: LanguageModel) -> None:
        """Put adapters on the policy's backbone if this reward shares it; called before `load`."""

    def load(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Load weights, if any. Called once before training, with the policy's tokenizer and its chat template."""

    def forward(self, rollout: Rollout) -> Tensor | Sequence[float]:
        """Score each completion of a rollout: Q numbers, higher is better. `__call__` checks them."""
        raise NotImplementedError(f"{type(self).__name__} must implement forward")

    def __call__(self, rollout: Rollout) -> Tensor:
        """Call `forward` and check its scores; see `checked`. Shape (Q,)."""
        return checked(super().__call__(rollout), rollout, self.title)

    @property
    def label(self) -> str:
        """Name in logs."""
        return type(self).__name__

    @property
    def title(self) -> str:
        """Name in errors; it distinguishes several rewards of one kind."""
        return self.label

    def parts(self) -> dict[str, Tensor]:
        """Parts of the last scores, each of shape (Q,). Their means are logged as `ppo/reward_NAME`."""
        return {}


def checked(scores: Sequence[float] | Tensor, rollout: Rollout, name: str) -> Tensor:
    """Convert scores to a CPU tensor and check them: one finite number per completion.

    Raises:
        ValueError: the number of scores is wrong, or a score is NaN, infinite or not a number; names the reward and the
            prompts.
    """
    try:
        scores_Q = torch.as_tensor(scores, dtype=torch.float32).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{name} returned {scores!r:.80}, expected a number for each completion: {error}; the prompts: "
            f"{named(rollout.rows)}"
        ) from error
    if scores_Q.shape != (rollout.num_sequences,):
        raise ValueError(
            f"{name} returned {tuple(scores_Q.shape)} scores for {rollout.num_sequences} completions; the prompts: "
            f"{named(rollout.rows)}"
        )
    bad = torch.nonzero(~scores_Q.isfinite())[:, 0].tolist()
    if bad:
        raise ValueError(
            f"{name} returned {scores_Q[bad[0]].item()} for {len(bad)} of {rollout.num_sequences} completions; the "
            f"prompts: {named([rollout.rows[q] for q in bad])}"
        )
    return scores_Q


def named(rows: Sequence[dict[str, Any]], limit: int = 3) -> str:
    """Prompts of rows for an error, each once: the beginning of the last message."""
    texts = list(dict.fromkeys(f"{_last(row.get('prompt'))!r:.100}" for row in rows))
    more = f" and {len(texts) - limit} more" if len(texts) > limit else ""
    return ", ".join(texts[:limit]) + more


def _last(prompt: Any) -> Any:
    return prompt[-1].get("content") if isinstance(prompt, list) and prompt else prompt
