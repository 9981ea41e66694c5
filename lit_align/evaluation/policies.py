"""Sample a policy on fixed prompts, and say how far it has moved from another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lit_align.functional.logprobs import sum_by_sequence
from lit_align.functional.packing import pack
from lit_align.models import LanguageModel, Network, load_causal_lm, load_tokenizer
from lit_align.models.load import device_of
from lit_align.rollout import Sampling, TransformersEngine
from lit_align.types import PackedBatch, Rollout


class Policy:
    """A model folder, ready to answer.

    Args:
        folder: Hugging Face folder or hub name.
        device: where to run; auto for a GPU if there is one.
    """

    def __init__(self, folder: str, device: str = "auto") -> None:
        self.device = device_of(device)
        self.model = LanguageModel(load_causal_lm(Network(folder))).eval().requires_grad_(False).to(self.device)
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(folder)

    def answer(
        self, prompts: Sequence[Tensor], rows: Sequence[dict[str, Any]], sampling: Sampling, seed: int
    ) -> Rollout:
        """Sample answers; `prompts` are token ids."""
        stops = self.model.hf.generation_config.eos_token_id
        stop_ids = {*(stops if isinstance(stops, list) else [stops]), self.tokenizer.eos_token_id} - {None}
        answers = TransformersEngine()(self.model, prompts, sampling, sorted(stop_ids), seed)
        completions = [completion for given in answers for completion in given]
        texts = self.tokenizer.batch_decode([c.tokens for c in completions], skip_special_tokens=True)
        k = sampling.samples
        return Rollout(
            [prompt for prompt in prompts for _ in range(k)],
            [row for row in rows for _ in range(k)],
            completions,
            [text.strip() for text in texts],
            k,
        )

    @torch.no_grad()
    def logps(self, rollout: Rollout, batch_size: int = 128) -> Tensor:
        """Log-probability of each sequence's answer, in nats. Shape (Q,)."""
        sums = []
        step = max(batch_size // rollout.samples, 1) * rollout.samples
        for first in range(0, rollout.num_sequences, step):
            part = rollout.pick(range(first, min(first + step, rollout.num_sequences)))
            batch = PackedBatch(*(x.to(self.device) for x in pack(part.examples())))
            sums.append(sum_by_sequence(self.model(batch).logps_S, batch.sequence_S, batch.num_sequences))
        return torch.cat(sums).cpu()


def sequence_kl(policy: Policy, reference: Policy, rollout: Rollout) -> Tensor:
    """Log policy / reference of each answer the policy gave; its mean estimates KL(policy || reference) in nats."""
    return policy.logps(rollout) - reference.logps(rollout)
