"""Held-out accuracy on pairs, and loss by source: counted by example, and synchronised over ranks once an epoch."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from lit_align.functional.interval import clustered_share
from lit_align.types import PackedBatch


def hits(better_P: Tensor, worse_P: Tensor) -> Tensor:
    """Of each pair 1 where the better answer scores higher, a half where both score the same, else 0. Shape (P,)."""
    return (better_P > worse_P).float() + 0.5 * (better_P == worse_P).float()


class PairAccuracy(Metric):
    """Share of pairs whose better answer scores higher; see `hits` for equal scores.

    `compute` gives the share and its 95 % interval, clustered by prompt.
    """

    full_state_update = False
    hits: list[Tensor]
    counts: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("hits", [], dist_reduce_fx="cat")
        self.add_state("counts", [], dist_reduce_fx="cat")

    def update(self, better_P: Tensor, worse_P: Tensor, example_P: Tensor, num_examples: int) -> None:
        """Count the pairs of a batch, by the scores of their answers and their examples."""
        hit_P = hits(better_P, worse_P)
        zeros_E = hit_P.new_zeros(num_examples)
        self.hits.append(zeros_E.index_add(0, example_P, hit_P))
        self.counts.append(zeros_E.index_add(0, example_P, torch.ones_like(hit_P)))

    def compute(self) -> tuple[Tensor, Tensor, Tensor]:
        """Share, lower and upper end."""
        return clustered_share(dim_zero_cat(self.hits), dim_zero_cat(self.counts))


class LossBySource(Metric):
    """Negative log-likelihood per scored token, in nats, of the examples of each data source.

    `compute` gives a mean for each source that had examples, by its number.
    """

    full_state_update = False
    losses: list[Tensor]
    tokens: list[Tensor]
    sources: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        for name in ("losses", "tokens", "sources"):
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(self, logps_S: Tensor, batch: PackedBatch) -> None:
        """Add a batch that says where its examples come from."""
        example_S = batch.example_Q[batch.sequence_S]
        loss_S = -logps_S.float()
        zeros_E = loss_S.new_zeros(batch.num_examples)  # not torch.zeros: the default type may be another
        self.losses.append(zeros_E.index_add(0, example_S, loss_S))
        self.tokens.append(zeros_E.index_add(0, example_S, torch.ones_like(loss_S)))
        self.sources.append(batch.origin_E)

    def compute(self) -> dict[int, Tensor]:
        """Means, by the number of the source."""
        losses, tokens, sources = map(dim_zero_cat, (self.losses, self.tokens, self.sources))
        kinds = sources.unique().tolist()
        return {source: losses[sources == source].sum() / tokens[sources == source].sum() for source in kinds}
