"""Sample a policy on fixed prompts, and say how far it has moved from another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lit_align.functional.packing import pack
from lit_align.models import LanguageModel, Network, load_causal_lm, load_tokenizer
from lit_align.models.load import device_of
from lit_align.rollout import Sampling, TransformersEngine, as_rollout, stop_tokens
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
        answers = TransformersEngine()(self.model, prompts, sampling, stop_tokens(self.model, self.tokenizer), seed)
        return as_rollout(prompts, rows, answers, self.tokenizer)

    @torch.no_grad()
    def logps(self, rollout: Rollout, batch_size: int = 128) -> Tensor:
        """Log-probability of each sequence's answer, in nats. Shape (Q,)."""
        sums = []
        step = max(batch_size // rollout.samples, 1) * rollout.samples
        for first in range(0, rollout.num_sequences, step):
            part = rollout.pick(range(first, min(first + step, rollout.num_sequences)))
            batch = PackedBatch(*(x.to(self.device) for x in pack(part.examples())))
            sums.append(self.model(batch).sums(batch))
        return torch.cat(sums).cpu()


def sequence_kl(policy: Policy, reference: Policy, rollout: Rollout) -> Tensor:
    """Log policy / reference of each answer the policy gave; its mean estimates KL(policy || reference) in nats."""
    return policy.logps(rollout) - reference.logps(rollout)
