"""Held-out accuracy on pairs, counted prompt by prompt, and synchronised over ranks once an epoch."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from lit_align.functional.interval import clustered_share
from lit_align.functional.reward import RankedPairs


class PairAccuracy(Metric):
    """Share of pairs whose better answer scores higher; equal scores count half.

    `compute` gives the share and its 95 % interval, clustered by prompt.
    """

    full_state_update = False
    hits: list[Tensor]
    counts: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("hits", [], dist_reduce_fx="cat")
        self.add_state("counts", [], dist_reduce_fx="cat")

    def update(self, score_Q: Tensor, pairs: RankedPairs, num_examples: int) -> None:
        """Count the pairs of a batch."""
        gap_P = score_Q[pairs.better_P] - score_Q[pairs.worse_P]
        hit_P = (gap_P > 0).float() + 0.5 * (gap_P == 0).float()
        zeros_E = hit_P.new_zeros(num_examples)
        self.hits.append(zeros_E.index_add(0, pairs.example_P, hit_P))
        self.counts.append(zeros_E.index_add(0, pairs.example_P, torch.ones_like(hit_P)))

    def compute(self) -> tuple[Tensor, Tensor, Tensor]:
        """Share, lower and upper end."""
        return clustered_share(dim_zero_cat(self.hits), dim_zero_cat(self.counts))
