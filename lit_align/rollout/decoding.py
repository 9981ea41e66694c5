"""A batch of prompts being answered by a transformers model. B sequences, T tokens so far."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lit_align.functional.logprobs import shape_logits
from lit_align.functional.sampling import draw
from lit_align.models.language import LanguageModel
from lit_align.rollout.cache import cache_argument, roomy_cache
from lit_align.rollout.engine import Sampling
from lit_align.types import Completion


class Decoding:
    """Prompts computed once each, then answered token by token; a sequence that has stopped leaves the batch."""

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
        self.cache: Any = roomy_cache(policy.hf.config)
        self.cache_argument = cache_argument(policy.hf.base_model)

    def run(self) -> list[list[Completion]]:
        """The completions of each prompt."""
        k = self.sampling.samples
        every = self.decode(self.prefill())
        return [every[i : i + k] for i in range(0, len(every), k)]

    def prefill(self) -> Tensor:
        """Compute the prompts, each once for all its samples; returns the logits of the first tokens, (B, V)."""
        # Explicit positions: a model with learnt ones would count the padding.
        positions_BT = (self.mask_BT.long().cumsum(1) - 1).clamp(min=0)
        logits_BV = self._forward(self.tokens_BT, positions_BT)
        if self.sampling.samples > 1:
            self.cache.batch_repeat_interleave(self.sampling.samples)
            logits_BV = logits_BV.repeat_interleave(self.sampling.samples, 0)
            self.mask_BT = self.mask_BT.repeat_interleave(self.sampling.samples, 0)
        return logits_BV

    def decode(self, logits_BV: Tensor) -> list[Completion]:
        """Answer, from the logits of the first tokens on."""
        limit, total, device = self.sampling.max_new_tokens, logits_BV.shape[0], logits_BV.device
        out = torch.zeros(total, limit, dtype=torch.long, device=device)
        logps = torch.zeros(total, limit, dtype=torch.float64, device=device)
        length = torch.full((total,), limit, device=device)
        finished = torch.zeros(total, dtype=torch.bool, device=device)
        running = torch.arange(total, device=device)
        positions_B = self.mask_BT.long().sum(1)
        for step in range(limit):
            token_B, logp_B = self.draw(logits_BV)
            out[running, step], logps[running, step] = token_B, logp_B.to(logps)
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
        return self.completions(out, logps, length, finished)

    def draw(self, logits_BV: Tensor) -> tuple[Tensor, Tensor]:
        """The next token of each sequence and its log-probability, both of shape (B,)."""
        if self.sampling.temperature == 0:
            token_B = logits_BV.argmax(-1)
            # 0, and NaN where the largest logit is not finite.
            return token_B, 0.0 * logits_BV.gather(1, token_B[:, None])[:, 0]
        shaped_BV = shape_logits(logits_BV, self.sampling.temperature, self.sampling.top_p)
        probs_BV = shaped_BV.softmax(-1)
        token_B = draw(probs_BV, self.generator)
        return token_B, probs_BV.gather(1, token_B[:, None])[:, 0].log()

    def completions(self, tokens: Tensor, logps: Tensor, length: Tensor, finished: Tensor) -> list[Completion]:
        """Rows of tokens as answers of their lengths.

        Raises:
            ValueError: some were drawn from probabilities that are not finite. Only now, as to look at each token would
                wait for the device at each.
        """
        said = torch.arange(logps.shape[1], device=logps.device) < length[:, None]
        if broken := int((logps.isnan() & said).any(1).sum()):
            raise ValueError(
                f"probabilities are not finite in {broken} of {len(logps)} answers: look at the weights and the "
                "learning rate; fp16 overflows, bf16 does not"
            )
        columns = zip(tokens.tolist(), logps.tolist(), length.tolist(), finished.tolist(), strict=True)
        drawn = self.sampling.temperature > 0
        return [Completion(row[:n], end, logp[:n] if drawn else None) for row, logp, n, end in columns]

    def _forward(self, tokens_BT: Tensor, positions_BT: Tensor) -> Tensor:
        output = self.policy.hf.base_model(
            input_ids=tokens_BT,
            attention_mask=self.mask_BT.long(),
            position_ids=positions_BT,
            use_cache=True,
            **{self.cache_argument: self.cache},
        )
        return self.policy.logits(output.last_hidden_state[:, -1])
