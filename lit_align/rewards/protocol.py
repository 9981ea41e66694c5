"""What scores a completion."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from lit_align.models.language import LanguageModel
from lit_align.types import Rollout


class Reward(nn.Module):
    """Base class of rewards: a user's own is a subclass reached by class_path, or a function (`FunctionReward`).

    An nn.Module, so that whatever weights it has follow the run to its device. They are frozen and never saved with
    the checkpoint.
    """

    def attach(self, policy: LanguageModel) -> None:
        """Put adapters on the policy's backbone, if this is a model that shares it; called before `load`."""

    def load(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Load weights, if any; called once before training, with the policy's tokenizer and its chat template."""

    def forward(self, rollout: Rollout) -> Tensor | Sequence[float]:
        """Score each sequence of a rollout: Q numbers, higher is better; `__call__` checks them."""
        raise NotImplementedError(f"{type(self).__name__} must implement forward")

    def __call__(self, rollout: Rollout) -> Tensor:
        """`forward`, its numbers checked: see `checked`. Shape (Q,)."""
        return checked(super().__call__(rollout), rollout, self.title)

    @property
    def label(self) -> str:
        """How logs call it."""
        return type(self).__name__

    @property
    def title(self) -> str:
        """How errors call it: which of several of its kind it is."""
        return self.label

    def parts(self) -> dict[str, Tensor]:
        """What the last scores were made of, each of shape (Q,): their means are logged as `ppo/reward_NAME`."""
        return {}


def checked(scores: Sequence[float] | Tensor, rollout: Rollout, name: str) -> Tensor:
    """Scores as a tensor on the CPU, one finite number per completion.

    Raises:
        ValueError: another number of scores, or one that is NaN, infinite or no number; names the reward and the
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
    """The prompts of some rows, each once, as an error shows them: the beginning of what was said last."""
    texts = list(dict.fromkeys(f"{_last(row.get('prompt'))!r:.100}" for row in rows))
    more = f" and {len(texts) - limit} more" if len(texts) > limit else ""
    return ", ".join(texts[:limit]) + more


def _last(prompt: Any) -> Any:
    return prompt[-1].get("content") if isinstance(prompt, list) and prompt else prompt
