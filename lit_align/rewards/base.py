"""What scores a completion."""

from __future__ import annotations

from collections.abc import Sequence

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

    def share(self, policy: LanguageModel) -> None:
        """Take adapters to the policy's backbone, if this is a model that shares it; called before `load`."""

    def load(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Load weights, if any; called once before training, with the policy's tokenizer."""

    def forward(self, rollout: Rollout) -> Tensor:
        """Score each sequence of a rollout. Shape (Q,), higher is better."""
        raise NotImplementedError(f"{type(self).__name__} must implement forward")


def checked(scores: Sequence[float] | Tensor, rollout: Rollout, name: str) -> Tensor:
    """Scores as a tensor, one finite number per completion.

    Raises:
        ValueError: another number of scores, or one that is NaN or infinite; names the reward and the prompt.
    """
    try:
        scores_Q = torch.as_tensor(scores, dtype=torch.float32).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name} returned {scores!r:.80}, expected a number for each completion: {error}") from error
    if scores_Q.shape != (rollout.num_sequences,):
        raise ValueError(f"{name} returned {tuple(scores_Q.shape)} scores for {rollout.num_sequences} completions")
    bad = torch.nonzero(~scores_Q.isfinite())[:, 0].tolist()
    if bad:
        first = rollout.rows[bad[0]].get("prompt")
        raise ValueError(
            f"{name} returned {scores_Q[bad[0]].item()} for {len(bad)} completions, the first to {first!r:.200}"
        )
    return scores_Q
