"""Prompts to completions: what a sampler is asked for, and what any engine must do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from lit_align.models.language import LanguageModel
from lit_align.types import Completion


@dataclass
class Sampling:
    """How answers are drawn; PPO scores them under this same distribution.

    Attributes:
        max_new_tokens: an answer that has not stopped by then is cut, and counts as unfinished.
        temperature: divides the logits; 0 takes the most probable token (not for training).
        top_p: nucleus; 1 keeps every token.
        samples: answers per prompt.
        batch_size: prompts that are decoded together.
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
    """Anything that answers prompts."""

    def __call__(
        self, policy: LanguageModel, prompts: Sequence[Tensor], sampling: Sampling, stop_ids: Sequence[int], seed: int
    ) -> list[list[Completion]]:
        """Answers to each prompt, `sampling.samples` of them, as a function of the seed and nothing else.

        Args:
            policy: what answers; an engine with weights of its own takes over these, at every call.
            prompts: token ids of each, 1-D.
            sampling: how they are answered.
            stop_ids: tokens that end an answer, and no others do.
            seed: of all draws of this call.

        Returns:
            The answers to each prompt, with the log-probabilities that they were drawn with: what was sampled by one
            program and is trained on by another differs, and PPO logs by how much.
        """
        ...
