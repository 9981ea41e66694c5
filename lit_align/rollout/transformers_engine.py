"""Sample with the trained transformers model itself, without a copy of the weights or a server."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

import torch
from torch import Tensor

from lit_align.models.language import LanguageModel
from lit_align.rollout.decoding import Decoding, RecomputedDecoding, decoding_of
from lit_align.rollout.engine import Sampling
from lit_align.types import Completion


class TransformersEngine:
    """Decode batches of prompts of similar length with a key-value cache.

    A prompt is computed once for all its samples. A sequence that has stopped leaves the batch.
    """

    @torch.no_grad()
    def __call__(
        self, policy: LanguageModel, prompts: Sequence[Tensor], sampling: Sampling, stop_ids: Sequence[int], seed: int
    ) -> list[list[Completion]]:
        """See `Engine`."""
        device = policy.hf.device
        generator = torch.Generator(device).manual_seed(seed)
        answers: list[list[Completion]] = [[] for _ in prompts]
        # With dropout, the sampled policy would differ from the scored one.
        training = policy.training
        policy.eval()
        try:
            by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
            kind = (
                self._decoding(policy, len(prompts[by_length[-1]]) + sampling.max_new_tokens) if prompts else Decoding
            )
            for chosen in _batches(by_length, prompts, sampling.batch_size, kind.pads):
                decoding = kind(policy, [prompts[i] for i in chosen], sampling, stop_ids, generator)
                for i, completions in zip(chosen, decoding.run(), strict=True):
                    answers[i] = completions
        finally:
            policy.train(training)
        return answers

    def _decoding(self, policy: LanguageModel, longest: int) -> type[Decoding]:
        if policy.switch is not None and longest > policy.switch:
            # Above this length the rotary frequencies change, so cached keys of shorter sequences are wrong.
            return RecomputedDecoding
        return decoding_of(policy)


def _batches(by_length: list[int], prompts: Sequence[Tensor], size: int, pads: bool) -> Iterator[list[int]]:
    """Group prompts to decode together: similar lengths, or equal lengths if the model cannot pad."""
    groups = [by_length] if pads else [list(same) for _, same in groupby(by_length, key=lambda i: len(prompts[i]))]
    for group in groups:
        for start in range(0, len(group), size):
            yield group[start : start + size]
