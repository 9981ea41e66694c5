"""Held-out accuracy on pairs, loss by source, means: synchronised over ranks once an epoch."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from lit_align.functional.interval import clustered_share
from lit_align.functional.reward import RankedPairs
from lit_align.types import PackedBatch


def hits(better_P: Tensor, worse_P: Tensor) -> Tensor:
    """Of each pair 1 where the better answer scores higher, a half where both score the same, else 0. Shape (P,)."""
    return (better_P > worse_P).float() + 0.5 * (better_P == worse_P).float()


def score_margin(score_Q: Tensor, pairs: RankedPairs) -> tuple[Tensor, int]:
    """How much higher the better answers of pairs score: a sum, and the number of pairs."""
    gap_P = score_Q[pairs.better_P] - score_Q[pairs.worse_P]
    return gap_P.detach().sum(), gap_P.numel()


def judged_rewards(reward_Q: Tensor, verdict_Q: Tensor, reference_point: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Sums and counts over answers that KTO takes for desirable or undesirable.

    Args:
        reward_Q: implicit reward. Shape (Q,).
        verdict_Q: 1, -1, or 0 for neither; see `verdicts`. Shape (Q,).
        reference_point: what a reward is held against: right is above it for 1, below it for -1.
    """
    wanted_Q, unwanted_Q = verdict_Q > 0, verdict_Q < 0
    right_Q = hits(verdict_Q * reward_Q, verdict_Q * reference_point) * verdict_Q.abs()
    return {
        "desired_reward": (reward_Q[wanted_Q].sum(), wanted_Q.sum()),
        "undesired_reward": (reward_Q[unwanted_Q].sum(), unwanted_Q.sum()),
        "judged_accuracy": (right_Q.sum(), verdict_Q.abs().sum()),
    }


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


class Means(Metric):
    """Means by name, each over all that was counted under it.

    `compute` leaves out what nothing was counted under.

    Args:
        names: of the means.
    """

    full_state_update = False

    def __init__(self, *names: str) -> None:
        super().__init__()
        self.names = names
        for name in names:
            for kind in ("sum", "count"):
                self.add_state(f"{kind}_{name}", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, **measures: tuple[Tensor, Tensor | int]) -> None:
        """Add sums and their counts; names that are not among these are passed over."""
        for name in self.names:
            if name in measures:
                total, count = measures[name]
                setattr(self, f"sum_{name}", getattr(self, f"sum_{name}") + total.detach())
                setattr(self, f"count_{name}", getattr(self, f"count_{name}") + count)

    def compute(self) -> dict[str, Tensor]:
        """Means, by name."""
        counts = {name: getattr(self, f"count_{name}") for name in self.names}
        return {name: getattr(self, f"sum_{name}") / count for name, count in counts.items() if count}


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
