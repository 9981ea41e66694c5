"""One score out of several: what the members of an ensemble of reward models say of an answer (M members).

Where the members agree all three are the same score; where one of them is fooled, the mean believes it in part, the
other two the less the more the others disagree.
"""

from __future__ import annotations

from torch import Tensor


def mean_score(score_MQ: Tensor) -> Tensor:
    """Mean over the members.

    Args:
        score_MQ: what each member says of each answer, on one scale. Shape (M, Q).

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

    The variance is that of the members at hand (divided by M), in squared units of the score: the price of
    disagreement depends on the scale.

    Args:
        score_MQ: what each member says of each answer, on one scale. Shape (M, Q).
        coef: lambda, in 1 / units of the score.

    Returns:
        Shape (Q,).

    Source: Coste et al. 2023, equation 5.
    """
    return score_MQ.mean(0) - coef * score_MQ.var(0, correction=0)
