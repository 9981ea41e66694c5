"""Confidence intervals for shares whose observations come in groups."""

from __future__ import annotations

import torch
from torch import Tensor


def clustered_share(hits_E: Tensor, counts_E: Tensor, z: float = 1.96) -> tuple[Tensor, Tensor, Tensor]:
    """Share of hits over all observations, with a confidence interval that respects the groups.

    Pairs of completions to one prompt are not independent, so an interval that assumes independence is too narrow. The
    share is a ratio of two sums over groups; its variance comes from the residuals hits - share * counts.

    Args:
        hits_E: hits in each group. Shape (E,).
        counts_E: observations in each group; empty groups are ignored. Shape (E,).
        z: standard normal quantile; 1.96 gives 95 %.

    Returns:
        Share, lower end, upper end; scalars in [0, 1]. The share is NaN without observations, and the ends are NaN
        with fewer than two non-empty groups: one group does not show how groups differ.

    Source: Cochran 1977, "Sampling Techniques", equation 2.39 (ratio estimator).
    """
    share = hits_E.sum() / counts_E.sum()
    groups = int((counts_E > 0).sum())
    variance = (hits_E - share * counts_E).square().sum()
    half = z * (variance * groups / (groups - 1)).sqrt() / counts_E.sum() if groups > 1 else share * torch.nan
    return share, (share - half).clamp(0, 1), (share + half).clamp(0, 1)
