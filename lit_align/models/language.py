"""A language model as the methods see it: log-probabilities of scored tokens."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from lit_align.functional.head import linear_logprobs
from lit_align.functional.logprobs import shape_logits, sum_by_sequence, token_entropies, token_logprobs
from lit_align.models.heads import FUSED, check_installed, obstacle
from lit_align.models.network import Head
from lit_align.models.trees import TreeModel
from lit_align.types import PackedBatch


class TokenScores(NamedTuple):
    """What a language model says of the scored tokens of a batch.

    Attributes:
        logps_S: log-probabilities, in nats.
        entropies_S: entropies of the next-token distributions, in nats, without gradient; None unless asked for.
        hidden_SH: the hidden states that predict, for a value head on the same trunk.
        hits_S: whether no token is more probable than the scored one; None unless asked for, and with a fused head.
    """

    logps_S: Tensor
    entropies_S: Tensor | None
    hidden_SH: Tensor
    hits_S: Any = None

    def sums(self, batch: PackedBatch) -> Tensor:
        """Log-probability of each sequence: the sum over its scored tokens. Shape (Q,)."""
        return sum_by_sequence(self.logps_S, batch.sequence_S, batch.num_sequences)


class LanguageModel(TreeModel):
    """A transformers causal language model that scores packed batches.

    Only scored positions reach the vocabulary: with a prompt of 300 tokens and an answer of 30, nine tenths of the
    largest matrix product are never computed. Where the logits of the scored ones are still large, they are made a
    chunk at a time and, unless the head is frozen, made again in backward: a third more work in the head, and its
    memory bounded.

    Args:
        hf: the model.
        head: who computes the log-probabilities, where it can; see `Network.head`.

    Attributes:
        decoding: how completions are computed, once that was probed; see `rollout.decoding`.
        dense_bytes: largest logits, in bytes of fp32, that are held at once.
        cached_bytes: how many a CPU looks at together, so that they stay in its cache.
    """

    decoding: str | None = None
    dense_bytes = 2**30
    cached_bytes = 2**24

    def __init__(self, hf: PreTrainedModel, head: Head = "own") -> None:
        super().__init__(hf)
        check_installed(head)
        self.head, self._said = head, set[tuple[str, str | None]]()
        self._check_head()

    @torch.no_grad()
    def _check_head(self) -> None:
        """Compare states and logits with the model's own, of tokens from all over the vocabulary.

        One token is not enough: where it is the padding its embedding is zero, and so are its logits by any rule.

        Raises:
            ValueError: they differ, or a token's logits depend on later tokens.
        """
        if self.hf.device.type == "meta":
            return
        name = type(self.hf).__name__
        vocabulary = self.hf.config.get_text_config().vocab_size
        ids = torch.tensor([[(5 + k * (vocabulary // 7) + k) % vocabulary for k in range(7)]], device=self.hf.device)
        training = self.hf.training
        self.hf.eval()
        try:
            own = self.hf(input_ids=ids, use_cache=False).logits.float()
            earlier = self.hf(input_ids=ids[:, :4], use_cache=False).logits.float()
            ours = self.logits(self.backbone(input_ids=ids, use_cache=False).last_hidden_state).float()
        except (ValueError, RuntimeError, TypeError, IndexError, AttributeError, AssertionError) as error:
            raise ValueError(
                f"{name} does not run on tokens alone: the architecture is not supported: {error}"
            ) from error
        finally:
            self.hf.train(training)
        atol = 1e-2 * own.abs().max().item()
        if own.shape != ours.shape or not torch.allclose(own, ours, rtol=1e-2, atol=atol):
            raise ValueError(
                f"{name} computes its logits in a way that is not known here, so its "
                "log-probabilities would be wrong: the architecture is not supported"
            )
        if not torch.allclose(own[:, :4], earlier, rtol=1e-2, atol=atol):
            raise ValueError(
                f"{name} attends to later tokens, so it is no causal language model (is `is_decoder` missing in its "
                "config.json?)"
            )

    def forward(
        self,
        batch: PackedBatch,
        temperature: float = 1.0,
        top_p: float = 1.0,
        entropies: bool = False,
        hits: bool = False,
    ) -> TokenScores:
        """Score a batch under the distribution that temperature and nucleus shape; see `shape_logits`."""
        hidden_SH, rows = self.hidden(batch)
        if not self._plain_head():
            return self._in_pieces(hidden_SH, rows.target_S, temperature, top_p, entropies, hits)
        states_SH, weight_VH = self._in_precision(hidden_SH)
        path = self._path(states_SH, temperature, top_p, entropies)
        if path in FUSED:
            return TokenScores(FUSED[path](states_SH, weight_VH, rows.target_S, temperature), None, hidden_SH)
        row = 4 * len(weight_VH)
        # On a GPU only the scratch tensor is bounded, for which an eighth of the logits is enough.
        limit = self.cached_bytes if hidden_SH.device.type == "cpu" else self.dense_bytes // 8
        options = temperature, top_p, entropies, max(limit // row, 1), max(self.dense_bytes // row, 1)
        hits_S = torch.empty_like(rows.target_S, dtype=torch.bool) if hits else None
        scores = linear_logprobs(states_SH, weight_VH, rows.target_S, *options, hits_S)
        return TokenScores(*scores, hidden_SH, hits_S)

    def _in_pieces(
        self, hidden_SH: Tensor, target_S: Tensor, temperature: float, top_p: float, entropies: bool, hits: bool
    ) -> TokenScores:
        """Where the head does more than a product: through `logits`, checkpointed where they are large."""
        why_not = f"the head of {type(self.hf).__name__} is more than a product" if self.head != "own" else None
        chunks = max(math.ceil(self._logits_bytes(hidden_SH) / self.dense_bytes), 1)
        self._say("chunked" if chunks > 1 else "dense", hidden_SH, why_not)
        pieces = []
        for part_SH, part_S in zip(hidden_SH.chunk(chunks), target_S.chunk(chunks), strict=True):
            arguments = (part_SH, part_S, temperature, top_p, entropies, hits)
            recompute = chunks > 1 and torch.is_grad_enabled()
            pieces.append(
                checkpoint(self._score, *arguments, use_reentrant=False) if recompute else self._score(*arguments)
            )
        logps_S = torch.cat([logps for logps, *_ in pieces])
        entropies_S = torch.cat([entropy for _, entropy, _ in pieces]) if entropies else None
        return TokenScores(logps_S, entropies_S, hidden_SH, torch.cat([hit for *_, hit in pieces]) if hits else None)

    def _score(
        self, hidden_SH: Tensor, target_S: Tensor, temperature: float, top_p: float, entropies: bool, hits: bool
    ) -> tuple[Tensor, Any, Any]:
        logits_SV = shape_logits(self.logits(hidden_SH), temperature, top_p, keep_S=target_S)
        fixed_SV = logits_SV.detach()
        entropies_S = token_entropies(fixed_SV) if entropies else None
        hits_S = fixed_SV.gather(1, target_S[:, None])[:, 0] >= fixed_SV.amax(-1) if hits else None
        return token_logprobs(logits_SV, target_S), entropies_S, hits_S

    def _path(self, states_SH: Tensor, temperature: float, top_p: float, entropies: bool) -> str:
        """Which way a head that is one matrix is gone through."""
        if self._logits_bytes(states_SH) <= self.dense_bytes:
            path, why_not = "dense", None  # whatever was asked for: to make logits twice costs time
        else:
            why_not = None if self.head == "own" else obstacle(self.head, states_SH, temperature, top_p, entropies)
            path = "chunked" if self.head == "own" or why_not else self.head
        self._say(path, states_SH, why_not)
        return path

    def _say(self, path: str, states_SH: Tensor, why_not: str | None) -> None:
        """Log which path was taken, and why: each once."""
        if (path, why_not) in self._said:
            return
        self._said.add((path, why_not))
        limit = f"{self.dense_bytes / 2**20:,.0f} MiB"
        held = {"dense": f"all are held up to {limit}", "chunked": f"{limit} are held"}.get(path, "none are held")
        rank_zero_info(
            f"vocabulary head: {path}, {f'not {self.head}, as {why_not}; ' if why_not else 'as '}"
            f"{len(states_SH):,} scored tokens x {self.hf.config.get_text_config().vocab_size:,} are "
            f"{self._logits_bytes(states_SH) / 2**20:,.0f} MiB of logits: {held}"
        )

    def _logits_bytes(self, states_SH: Tensor) -> int:
        """Of all logits, in fp32."""
        return 4 * len(states_SH) * int(self.hf.config.get_text_config().vocab_size)

    def _plain_head(self) -> bool:
        """Whether the head is one matrix and nothing else."""
        config, head = self.hf.config.get_text_config(), self.hf.get_output_embeddings()
        extras = ("logit_scale", "logits_scaling", "lm_head_multiplier", *SOFTCAPS)
        if type(head) is not nn.Linear or head.bias is not None:
            return False
        return all(getattr(config, key, None) in (None, 1.0) for key in extras)

    def _in_precision(self, hidden_SH: Tensor) -> tuple[Tensor, Tensor]:
        """States and the head's matrix, as autocast would have them in a product."""
        weight_VH, device = self.hf.get_output_embeddings().weight, hidden_SH.device.type
        if not torch.is_autocast_enabled(device):
            return hidden_SH, weight_VH
        return hidden_SH.to(torch.get_autocast_dtype(device)), weight_VH.to(torch.get_autocast_dtype(device))

    def logits(self, hidden_SH: Tensor) -> Tensor:
        """Hidden states to logits, with whatever the architecture does behind its output embeddings."""
        config = self.hf.config.get_text_config()
        logits_SV = self.hf.get_output_embeddings()(hidden_SH)
        scale = (
            _factor(config, "logit_scale") * _factor(config, "lm_head_multiplier") / _factor(config, "logits_scaling")
        )
        if scale != 1.0:  # a pass over the largest tensor there is
            logits_SV = logits_SV * scale
        cap = next((getattr(config, key) for key in SOFTCAPS if getattr(config, key, None)), None)
        return logits_SV if cap is None else cap * (logits_SV / cap).tanh()


# What configurations call the bound that a tanh puts on logits: Gemma 2 to 4, RecurrentGemma.
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap")


def _factor(config: Any, key: str) -> float:
    """A factor of the logits; MPT gives null for none."""
    value = getattr(config, key, None)
    return 1.0 if value is None else float(value)
