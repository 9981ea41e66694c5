"""KTO: completions that are desirable or undesirable, judged one by one instead of in pairs.

A log-ratio is log policy - log reference, *summed over the tokens of a completion*, in nats.
"""

from __future__ import annotations

import torch
from torch import Tensor


def verdicts(rank_Q: Tensor, example_Q: Tensor) -> Tensor:
    """KTO's label of each completion: 1 desirable, -1 undesirable, 0 neither.

    Among several completions of a prompt, one is desirable if it beats more of the others than it loses to, undesirable
    if it loses to more. The middle one of three and all members of a complete tie are neither. A pair therefore gives
    one of each. The rank of a lone completion is its label: desirable at 0 or below.

    Args:
        rank_Q: rank of each completion, lower is better. Shape (Q,).
        example_Q: prompt of each completion. Shape (Q,).

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
    """1 - sigmoid(+-beta (log-ratio - z)), + for desirable completions and - for undesirable ones.

    Args:
        log_ratio_Q: log policy / reference of each completion. Shape (Q,).
        verdict_Q: see `verdicts`; 0 gives the loss 0. Shape (Q,).
        reference_point: z, an estimate of KL(policy || reference), at least 0 and without gradient: the mean log-ratio
            of prompts paired with completions of *other* prompts. Their own completions would give the mean reward.
        beta: how fast the loss saturates on both sides of z.
        desirable_weight: lambda_D.
        undesirable_weight: lambda_U.

    Returns:
        Shape (Q,), without unit, between 0 and the weight.

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
    """Mean of `kto_loss` over the desirable and undesirable completions of each prompt.

    The mean keeps a prompt with nine completions from outvoting one with two. A prompt without labelled completions
    gets 0.

    Args:
        log_ratio_Q: log policy / reference of each completion. Shape (Q,).
        rank_Q: rank of each completion, lower is better. Shape (Q,).
        example_Q: prompt of each completion. Shape (Q,).
        num_examples: E.
        reference_point: z; see `kto_loss`.
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
