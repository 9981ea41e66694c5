"""A batch of prompts being answered by a transformers model. B sequences, T tokens so far."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from lit_align.functional.logprobs import shape_logits
from lit_align.functional.sampling import draw
from lit_align.models.language import LanguageModel
from lit_align.rollout.cache import cache_argument, roomy_cache
from lit_align.rollout.engine import Sampling
from lit_align.types import Completion


class Decoding:
    """Prompts computed once each, then answered token by token; a sequence that has stopped leaves the batch.

    Attributes:
        pads: whether prompts of different length may be answered together.
    """

    pads: ClassVar[bool] = True

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
        self.begin()

    def begin(self) -> None:
        """Make what is kept between two tokens."""
        self.cache: Any = roomy_cache(self.policy.hf.config)
        self.cache_argument = cache_argument(self.policy.backbone)

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
                self.keep(alive)
                token_B, positions_B, running = token_B[alive], positions_B[alive], running[alive]
            logits_BV = self.next_logits(token_B, positions_B)
            positions_B = positions_B + 1
        return self.completions(out, logps, length, finished)

    def keep(self, alive: Tensor) -> None:
        """Go on with some of the sequences, by their index in the batch."""
        self.cache.batch_select_indices(alive)
        self.mask_BT = self.mask_BT[alive]

    def next_logits(self, token_B: Tensor, positions_B: Tensor) -> Tensor:
        """Add a token to each sequence; returns the logits of the one that follows, (B, V)."""
        self.mask_BT = torch.nn.functional.pad(self.mask_BT, (0, 1), value=True)
        return self._forward(token_B[:, None], positions_B[:, None])

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
        output = self.policy.backbone(
            input_ids=tokens_BT,
            attention_mask=self.mask_BT.long(),
            position_ids=positions_BT,
            use_cache=True,
            **{self.cache_argument: self.cache},
        )
        return self.policy.logits(output.last_hidden_state[:, -1])


class KeptDecoding(Decoding):
    """With a cache whose states cannot be repeated or selected: recurrent layers, and hybrids of them.

    Prompts have one length, each sample computes its own, and a sequence that has stopped stays in the batch.
    """

    pads = False

    def prefill(self) -> Tensor:
        """Compute the prompt of each sample; returns the logits of the first tokens, (B, V)."""
        self.tokens_BT = self.tokens_BT.repeat_interleave(self.sampling.samples, 0)
        self.mask_BT = self.mask_BT.repeat_interleave(self.sampling.samples, 0)
        self.rows = torch.arange(len(self.tokens_BT), device=self.tokens_BT.device)
        return self._forward(self.tokens_BT, torch.arange(self.tokens_BT.shape[1], device=self.tokens_BT.device)[None])

    def keep(self, alive: Tensor) -> None:
        """Go on with some of the sequences; the others are fed a token that nobody reads."""
        self.rows = self.rows[alive]

    def next_logits(self, token_B: Tensor, positions_B: Tensor) -> Tensor:
        """Add a token to each sequence; returns the logits of the one that follows, (B, V)."""
        every = token_B.new_zeros(len(self.tokens_BT))
        every[self.rows] = token_B
        return self._forward(every[:, None], positions_B[:1, None])[self.rows]

    def _forward(self, tokens_BT: Tensor, positions_1T: Tensor) -> Tensor:
        # No mask: nothing is padded.
        output = self.policy.backbone(
            input_ids=tokens_BT,
            position_ids=positions_1T.expand_as(tokens_BT),
            use_cache=True,
            **{self.cache_argument: self.cache},
        )
        return self.policy.logits(output.last_hidden_state[:, -1])


class RecomputedDecoding(Decoding):
    """Without a cache: a full forward for each token, exact for every model that scores, and slow.

    Prompts have one length.
    """

    pads = False

    def begin(self) -> None:
        """Nothing is kept but the tokens."""

    def prefill(self) -> Tensor:
        """Compute the prompts; returns the logits of the first tokens, (B, V)."""
        logits_BV = self._logits().repeat_interleave(self.sampling.samples, 0)
        self.tokens_BT = self.tokens_BT.repeat_interleave(self.sampling.samples, 0)
        self.mask_BT = self.mask_BT.repeat_interleave(self.sampling.samples, 0)
        return logits_BV

    def keep(self, alive: Tensor) -> None:
        """Go on with some of the sequences."""
        self.tokens_BT = self.tokens_BT[alive]

    def next_logits(self, token_B: Tensor, positions_B: Tensor) -> Tensor:
        """Add a token to each sequence; returns the logits of the one that follows, (B, V)."""
        self.tokens_BT = torch.cat([self.tokens_BT, token_B[:, None]], 1)
        return self._logits()

    def _logits(self) -> Tensor:
        output = self.policy.backbone(input_ids=self.tokens_BT, use_cache=False)
        return self.policy.logits(output.last_hidden_state[:, -1])


# The ways to decode, the fastest first.
DECODINGS: dict[str, type[Decoding]] = {
    "cached": Decoding,
    "cached, stopped rows stay": KeptDecoding,
    "recomputed": RecomputedDecoding,
}


def decoding_of(policy: LanguageModel) -> type[Decoding]:
    """The fastest way to decode that gives a model's own logits; probed once, and said if it is not the usual one.

    A cache that a model swallows under another name, states that forget, layers whose cache has no rows to select: none
    of these raises an error, and each would sample from another distribution than the one that is scored.

    Raises:
        ValueError: none does.
    """
    if policy.decoding is None:
        policy.decoding = next((name for name, kind in DECODINGS.items() if _same_logits(policy, kind)), None)
        name = type(policy.hf).__name__
        if policy.decoding is None:
            raise ValueError(
                f"{name} cannot be sampled from here: its logits change with what stands beside a sequence"
            )
        if policy.decoding != "cached":
            how = {
                "recomputed": "no cache gives its logits, so each token takes a full forward",
                "cached, stopped rows stay": "its cache is right only for prompts of one length whose samples all stay",
            }[policy.decoding]
            warnings.warn(f"{name} samples slowly: {how}", stacklevel=2)
    return DECODINGS[policy.decoding]


@torch.no_grad()
def _same_logits(policy: LanguageModel, kind: type[Decoding]) -> bool:
    """Whether a way to decode gives the logits of full forwards: two samples a prompt, of which some stop early."""
    device, samples = policy.hf.device, 2
    vocabulary = policy.hf.config.get_text_config().vocab_size
    lengths = (2, 5) if kind.pads else (4, 4)
    prompts = [torch.tensor([(5 + 7 * i + 11 * k) % vocabulary for i in range(n)]) for k, n in enumerate(lengths)]
    sequences = [prompt.tolist() for prompt in prompts for _ in range(samples)]
    training = policy.training
    policy.eval()
    try:
        sampling = Sampling(max_new_tokens=4, samples=samples)
        decoding = kind(policy, prompts, sampling, [], torch.Generator(device).manual_seed(0))
        pairs = [(decoding.prefill(), sequences)]
        positions_B = decoding.mask_BT.long().sum(1)
        for step, alive in enumerate(([0, 1, 2, 3], [0, 3], [1])):
            decoding.keep(torch.tensor(alive, device=device))
            tokens = [(3 + 5 * step + 13 * row) % vocabulary for row in alive]
            sequences = [[*sequences[row], token] for row, token in zip(alive, tokens, strict=True)]
            positions_B = positions_B[alive] + int(step > 0)
            pairs.append((decoding.next_logits(torch.tensor(tokens, device=device), positions_B), sequences))
        for got_BV, expected in pairs:
            for got_V, tokens in zip(got_BV, expected, strict=True):
                states = policy.backbone(input_ids=torch.tensor([tokens], device=device), use_cache=False)
                alone_V = policy.logits(states.last_hidden_state[0, -1])
                half = policy.hf.dtype in (torch.bfloat16, torch.float16) or torch.is_autocast_enabled(device.type)
                tolerance = 0.1 if half else 1e-3
                # A NaN is not below it.
                if not (got_V - alone_V).abs().max() <= tolerance * alone_V.abs().max():
                    return False
    except torch.OutOfMemoryError:
        raise  # says nothing of the model
    except (ValueError, RuntimeError, TypeError, IndexError, AttributeError, AssertionError):
        return False
    finally:
        policy.train(training)
    return True
