"""Combine the scores of an ensemble of M reward models into one score per completion.

If the members agree, all three rules give the same score. If one member is fooled, the mean follows it in part; the
worst case and the uncertainty-weighted score follow it less, the more the members disagree.
"""

from __future__ import annotations

from torch import Tensor


def mean_score(score_MQ: Tensor) -> Tensor:
    """Mean over the members.

    Args:
        score_MQ: score of each completion by each member, all on one scale. Shape (M, Q).

    Returns:
        Shape (Q,).

    Source: Coste et al. 2023, "Reward Model Ensembles Help Mitigate Overoptimization", equation 3.
    """
    return score_MQ.mean(0)


def worst_case_score(score_MQ: Tensor) -> Tensor:
    """Minimum over the members (WCO); see `mean_score`.

    Source: Coste et al. 2023, equation 4.
    """
    return score_MQ.amin(0)


def uncertainty_weighted_score(score_MQ: Tensor, coef: float) -> Tensor:
    """Mean over the members, minus `coef` times their variance (UWO); see `mean_score`.

    The variance is the biased one (divided by M), in squared units of the score. The penalty therefore depends on the
    scale of the scores.

    Args:
        score_MQ: score of each completion by each member, all on one scale. Shape (M, Q).
        coef: lambda, in 1 / units of the score.

    Returns:
        Shape (Q,).

    Source: Coste et al. 2023, equation 5.
    """
    return score_MQ.mean(0) - coef * score_MQ.var(0, correction=0)
