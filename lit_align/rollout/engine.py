"""Sampling options, and the protocol of an engine that turns prompts into completions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from lit_align.models.language import LanguageModel
from lit_align.types import Completion


@dataclass
class Sampling:
    """How completions are sampled. PPO scores them under the same distribution.

    Attributes:
        max_new_tokens: a completion that has not stopped by then is cut and counts as unfinished.
        temperature: divides the logits; 0 takes the most probable token (not for training).
        top_p: mass of the nucleus; 1 keeps every token.
        samples: completions per prompt.
        batch_size: prompts decoded together.
    """

    max_new_tokens: int = 128
    temperature: float = 1.0
    top_p: float = 1.0
    samples: int = 1
    batch_size: int = 256

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or self.samples < 1 or self.batch_size < 1:
            raise ValueError("sampling: max_new_tokens, samples and batch_size must be at least 1")
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ValueError("sampling: temperature must not be negative, and top_p must be in (0, 1]")


class Engine(Protocol):
    """An object that samples completions of prompts."""

    def __call__(
        self, policy: LanguageModel, prompts: Sequence[Tensor], sampling: Sampling, stop_ids: Sequence[int], seed: int
    ) -> list[list[Completion]]:
        """Sample `sampling.samples` completions of each prompt. The result depends on the seed and nothing else.

        Args:
            policy: the model to sample from; an engine with its own copy of the weights synchronises at every call.
            prompts: token ids of each prompt, 1-D.
            sampling: sampling options.
            stop_ids: the tokens that end a completion.
            seed: seed of all draws of this call.

        Returns:
            The completions of each prompt, with the log-probabilities that they were sampled with. Engine and trainer
            differ slightly, and PPO logs by how much.
        """
        ...
