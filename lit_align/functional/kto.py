"""KTO: answers that are wanted or not, each for itself, and not in pairs.

Log-ratios are those of policy and reference, *sums over the tokens of an answer*, in nats.
"""

from __future__ import annotations

import torch
from torch import Tensor


def verdicts(rank_Q: Tensor, example_Q: Tensor) -> Tensor:
    """What KTO knows of an answer: 1 desirable, -1 undesirable, 0 neither.

    Of several answers to a prompt those are desirable that beat more of the others than they lose to; the middle one of
    three, or each of a tie of all, is neither. So a pair is one of each. A lone answer has nobody to beat, and its rank
    is the verdict: desirable at 0 or below.

    Args:
        rank_Q: rank of each answer, lower is better. Shape (Q,).
        example_Q: prompt of each answer. Shape (Q,).

    Returns:
        Shape (Q,).
    """
    same_QQ = example_Q[:, None] == example_Q[None, :]
    beaten_Q = ((rank_Q[None, :] - rank_Q[:, None]).sign() * same_QQ).sum(1)
    alone_Q = torch.where(rank_Q > 0, -1.0, 1.0)
    return torch.where(same_QQ.sum(1) == 1, alone_Q, beaten_Q.sign())


def kto_loss(
    log_ratio_Q: Tensor,
    verdict_Q: Tensor,
    reference_point: Tensor | float,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """1 - sigmoid(+-beta (log-ratio - z)), + for desirable answers and - for undesirable ones.

    Args:
        log_ratio_Q: log policy / reference of each answer. Shape (Q,).
        verdict_Q: see `verdicts`; 0 gives the loss 0. Shape (Q,).
        reference_point: z, an estimate of KL(policy || reference), at least 0 and without gradient: the mean log-ratio
            of prompts with answers to *other* prompts. That of the answers themselves would be their mean reward.
        beta: how fast the loss saturates on both sides of z.
        desirable_weight: lambda_D.
        undesirable_weight: lambda_U.

    Returns:
        Shape (Q,), between 0 and the weight, and not in nats.

    Source: Ethayarajh et al. 2024, "KTO: Model Alignment as Prospect Theoretic Optimization", equations 7 and 8.
    """
    wanted_Q, unwanted_Q = (verdict_Q > 0).to(log_ratio_Q), (verdict_Q < 0).to(log_ratio_Q)
    weight_Q = desirable_weight * wanted_Q + undesirable_weight * unwanted_Q
    return weight_Q * (-beta * verdict_Q * (log_ratio_Q - reference_point)).sigmoid()


def ranked_kto_loss(
    log_ratio_Q: Tensor,
    rank_Q: Tensor,
    example_Q: Tensor,
    num_examples: int,
    reference_point: Tensor | float,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """Mean of `kto_loss` over the answers of each prompt that `verdicts` judges desirable or undesirable.

    A mean, so that a prompt with nine answers does not outvote one with two; a prompt without any judged answer gets 0.

    Args:
        log_ratio_Q: log policy / reference of each answer. Shape (Q,).
        rank_Q: rank of each answer, lower is better. Shape (Q,).
        example_Q: prompt of each answer. Shape (Q,).
        num_examples: E.
        reference_point: see `kto_loss`, as for what follows.
        beta: how fast the loss saturates.
        desirable_weight: lambda_D.
        undesirable_weight: lambda_U.

    Returns:
        Shape (E,).
    """
    verdict_Q = verdicts(rank_Q, example_Q)
    loss_Q = kto_loss(log_ratio_Q, verdict_Q, reference_point, beta, desirable_weight, undesirable_weight)
    zeros_E = loss_Q.new_zeros(num_examples)
    judged_E = zeros_E.index_add(0, example_Q, verdict_Q.abs().to(loss_Q))
    return zeros_E.index_add(0, example_Q, loss_Q) / judged_E.clamp(min=1)
