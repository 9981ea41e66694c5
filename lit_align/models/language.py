"""A language model as the methods see it: log-probabilities of scored tokens."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from lit_align.functional.logprobs import shape_logits, sum_by_sequence, token_entropies, token_logprobs
from lit_align.models.trees import TreeModel
from lit_align.types import PackedBatch


class TokenScores(NamedTuple):
    """What a language model says of the scored tokens of a batch.

    Attributes:
        logps_S: log-probabilities, in nats.
        entropies_S: entropies of the next-token distributions, in nats, without gradient; None unless asked for.
        hidden_SH: the hidden states that predict, for a value head on the same trunk.
    """

    logps_S: Tensor
    entropies_S: Tensor | None
    hidden_SH: Tensor

    def sums(self, batch: PackedBatch) -> Tensor:
        """Log-probability of each sequence: the sum over its scored tokens. Shape (Q,)."""
        return sum_by_sequence(self.logps_S, batch.sequence_S, batch.num_sequences)


class LanguageModel(TreeModel):
    """A transformers causal language model that scores packed batches.

    Only scored positions reach the vocabulary: with a prompt of 300 tokens and an answer of 30, nine tenths of the
    largest matrix product are never computed.
    """

    def forward(
        self, batch: PackedBatch, temperature: float = 1.0, top_p: float = 1.0, entropies: bool = False
    ) -> TokenScores:
        """Score a batch under the distribution that temperature and nucleus shape; see `shape_logits`."""
        hidden, rows = self.hidden(batch)
        hidden_SH = hidden[rows.source_S]
        logits_SV = shape_logits(self.logits(hidden_SH), temperature, top_p, keep_S=rows.target_S)
        entropies_S = token_entropies(logits_SV.detach()) if entropies else None
        return TokenScores(token_logprobs(logits_SV, rows.target_S), entropies_S, hidden_SH)

    def logits(self, hidden_SH: Tensor) -> Tensor:
        """Hidden states to logits, with whatever the architecture does behind its output embeddings."""
        config = self.hf.config.get_text_config()
        logits_SV = self.hf.get_output_embeddings()(hidden_SH)
        logits_SV = logits_SV * getattr(config, "logit_scale", 1.0) / getattr(config, "logits_scaling", 1.0)
        cap = getattr(config, "final_logit_softcapping", None)
        return logits_SV if cap is None else cap * (logits_SV / cap).tanh()
