"""A scalar model as the methods see it: the reward of a sequence, or the value of each state before a scored token."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lit_align.functional.logprobs import upcast
from lit_align.models.trees import Read, TreeModel
from lit_align.types import PackedBatch


class Scorer(nn.Module):
    """Scores packed batches by a scalar head on some backbone's hidden states.

    The last token of a sequence is found by the batch, never by comparing ids with the padding token: where padding
    and stop token are one id, that comparison reads the score of a finished answer before its end.

    Attributes:
        mean, std: affine normalisation of rewards, learned after training and kept in the exported folder: rewards
            are (score - mean) / std.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: float = 0.0, std: float = 1.0) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean))
        self.register_buffer("std", torch.tensor(std))

    @property
    def score(self) -> nn.Linear:
        """The head."""
        raise NotImplementedError

    def hidden(self, batch: PackedBatch, read: Read = "source_S") -> tuple[Tensor, PackedBatch]:
        """See `TreeModel.hidden`."""
        raise NotImplementedError

    def forward(self, batch: PackedBatch) -> Tensor:
        """Raw score of each sequence, read at its last token. Shape (Q,)."""
        hidden_QH, _ = self.hidden(batch, "last_Q")
        return self.head(hidden_QH)

    def rewards(self, batch: PackedBatch) -> Tensor:
        """Normalised reward of each sequence. Shape (Q,)."""
        return (self(batch) - self.mean) / self.std

    def values(self, batch: PackedBatch) -> Tensor:
        """Normalised value of the state before each scored token. Shape (S,)."""
        hidden_SH, _ = self.hidden(batch)
        return (self.head(hidden_SH) - self.mean) / self.std

    def head(self, hidden: Tensor) -> Tensor:
        """Hidden states to scalars, in fp32 at least."""
        return _in_fp32(self.score, hidden)

    def normalize(self, mean: float, std: float) -> None:
        """Make rewards (score - mean) / std from here on."""
        self.mean.fill_(mean)
        self.std.fill_(std)


class ScalarModel(TreeModel, Scorer):
    """A transformers sequence-classification model with one label that scores packed batches."""

    def __init__(self, hf: PreTrainedModel) -> None:
        super().__init__(hf)
        Scorer.normalize(self, *normalization(hf))

    @property
    def score(self) -> nn.Linear:
        """The head."""
        return cast(nn.Linear, self.hf.score)

    def normalize(self, mean: float, std: float) -> None:
        """Make rewards (score - mean) / std from here on, also in the exported folder."""
        super().normalize(mean, std)
        self.hf.config.reward_mean, self.hf.config.reward_std = mean, std


def normalization(hf: PreTrainedModel) -> tuple[float, float]:
    """Mean and standard deviation that a reward model's folder carries."""
    return float(getattr(hf.config, "reward_mean", 0.0)), float(getattr(hf.config, "reward_std", 1.0))


class ValueHead(nn.Module):
    """A value per state on a trunk shared with the policy.

    Starts at 0 (Huang et al. 2024, detail 11), so that the first advantages are the returns themselves.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, hidden_SH: Tensor) -> Tensor:
        """Shape (S,)."""
        return _in_fp32(self.linear, hidden_SH)


def _in_fp32(head: Any, hidden: Tensor) -> Tensor:
    """A scalar per hidden state, computed in fp32 at least: autocast would leave it three digits."""
    with torch.autocast(hidden.device.type, enabled=False):
        bias = None if head.bias is None else upcast(head.bias)
        return nn.functional.linear(upcast(hidden), upcast(head.weight), bias).squeeze(-1)
