"""Sampling with the transformers model itself: the weights that are trained, no copy and no server."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from transformers import DynamicCache

from lit_align.functional.logprobs import shape_logits
from lit_align.functional.sampling import draw
from lit_align.models.language import LanguageModel
from lit_align.rollout.engine import Sampling
from lit_align.types import Completion


class TransformersEngine:
    """Decodes batches of prompts of similar length with a key-value cache.

    A prompt is computed once for all its samples, and a sequence that has stopped leaves the batch.
    """

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
                batch = _Decoding(policy, [prompts[i] for i in chosen], sampling, stop_ids, generator)
                for i, completions in zip(chosen, batch.run(), strict=True):
                    answers[i] = completions
        finally:
            policy.train(training)
        return answers


class _Decoding:
    """One batch of prompts being answered. B sequences still running, T tokens in the cache."""

    def __init__(
        self,
        policy: LanguageModel,
        prompts: list[Tensor],
        sampling: Sampling,
        stop_ids: Sequence[int],
        generator: torch.Generator,
    ) -> None:
        self.policy, self.sampling, self.generator = policy, sampling, generator
        device = policy.hf.device
        self.stops = torch.tensor(list(stop_ids), device=device, dtype=torch.long)
        longest = max(map(len, prompts))
        # Padded on the left, so that the last column is every prompt's last token.
        self.tokens_BT = torch.zeros(len(prompts), longest, dtype=torch.long, device=device)
        self.mask_BT = torch.zeros(len(prompts), longest, dtype=torch.bool, device=device)
        for i, prompt in enumerate(prompts):
            self.tokens_BT[i, longest - len(prompt) :] = prompt.to(device)
            self.mask_BT[i, longest - len(prompt) :] = True
        self.cache = DynamicCache(config=policy.hf.config)

    def run(self) -> Iterator[list[Completion]]:
        """The completions of each prompt."""
        samples, limit = self.sampling.samples, self.sampling.max_new_tokens
        # Explicit positions: a model with learnt ones would count the padding.
        positions_BT = (self.mask_BT.long().cumsum(1) - 1).clamp(min=0)
        logits_BV = self._forward(self.tokens_BT, positions_BT)
        if samples > 1:
            self.cache.batch_repeat_interleave(samples)
            logits_BV = logits_BV.repeat_interleave(samples, 0)
            self.mask_BT = self.mask_BT.repeat_interleave(samples, 0)
        total = logits_BV.shape[0]
        out = torch.zeros(total, limit, dtype=torch.long, device=logits_BV.device)
        length = torch.full((total,), limit, device=logits_BV.device)
        finished = torch.zeros(total, dtype=torch.bool, device=logits_BV.device)
        running = torch.arange(total, device=logits_BV.device)
        positions_B = self.mask_BT.long().sum(1)
        for step in range(limit):
            token_B = self._draw(logits_BV)
            out[running, step] = token_B
            stopped_B = torch.isin(token_B, self.stops)
            finished[running] = stopped_B
            length[running[stopped_B]] = step + 1
            alive = torch.nonzero(~stopped_B)[:, 0]
            if not len(alive) or step + 1 == limit:
                break
            if len(alive) < len(running):
                self.cache.batch_select_indices(alive)
                self.mask_BT, positions_B = self.mask_BT[alive], positions_B[alive]
                token_B, running = token_B[alive], running[alive]
            self.mask_BT = torch.nn.functional.pad(self.mask_BT, (0, 1), value=True)
            logits_BV = self._forward(token_B[:, None], positions_B[:, None])
            positions_B = positions_B + 1
        rows, lengths, ends = out.tolist(), length.tolist(), finished.tolist()
        every = [Completion(row[:n], end) for row, n, end in zip(rows, lengths, ends, strict=True)]
        for i in range(0, total, samples):
            yield every[i : i + samples]

    def _forward(self, tokens_BT: Tensor, positions_BT: Tensor) -> Tensor:
        output = self.policy.hf.base_model(
            input_ids=tokens_BT,
            attention_mask=self.mask_BT.long(),
            position_ids=positions_BT,
            past_key_values=self.cache,
            use_cache=True,
        )
        return self.policy.logits(output.last_hidden_state[:, -1])

    def _draw(self, logits_BV: Tensor) -> Tensor:
        if self.sampling.temperature == 0:
            return logits_BV.argmax(-1)
        shaped_BV = shape_logits(logits_BV, self.sampling.temperature, self.sampling.top_p)
        return draw(shaped_BV.softmax(-1), self.generator)
