"""Sampling with the transformers model itself: the weights that are trained, no copy and no server."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lit_align.models.language import LanguageModel
from lit_align.rollout.decoding import Decoding
from lit_align.rollout.engine import Sampling
from lit_align.rollout.static_decoding import StaticDecoding, decodes_statically
from lit_align.types import Completion


class TransformersEngine:
    """Decodes batches of prompts of similar length with a key-value cache.

    A prompt is computed once for all its samples, and a sequence that has stopped leaves the batch.

    Args:
        static: decode with a cache of fixed size and, on a GPU, a step captured as a CUDA graph, where the model's
            layers allow it. Not yet run on a GPU, and off until it was.
    """

    def __init__(self, static: bool = False) -> None:
        self.static = static

    @torch.no_grad()
    def __call__(
        self, policy: LanguageModel, prompts: Sequence[Tensor], sampling: Sampling, stop_ids: Sequence[int], seed: int
    ) -> list[list[Completion]]:
        """See `Engine`."""
        device = policy.hf.device
        generator = torch.Generator(device).manual_seed(seed)
        answers: list[list[Completion]] = [[] for _ in prompts]
        # Dropout would make the sampler another policy than the one that is scored.
        training = policy.training
        policy.eval()
        try:
            by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
            for start in range(0, len(by_length), sampling.batch_size):
                chosen = by_length[start : start + sampling.batch_size]
                decoding = self._decoding(policy)(policy, [prompts[i] for i in chosen], sampling, stop_ids, generator)
                for i, completions in zip(chosen, decoding.run(), strict=True):
                    answers[i] = completions
        finally:
            policy.train(training)
        return answers

    def _decoding(self, policy: LanguageModel) -> type[Decoding]:
        return StaticDecoding if self.static and decodes_statically(policy) else Decoding
