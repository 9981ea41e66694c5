"""Losses for reward models: scores of answers against how people ranked them.

Rankings are flat: a score and a rank per answer (lower is better, equal is a tie) and the example, that is the prompt,
that the answer belongs to. Pairs are indices into that list.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


class RankedPairs(NamedTuple):
    """All pairs of answers to one prompt of which one is ranked above the other.

    Attributes:
        better_P: index of the better answer, into the list of answers.
        worse_P: index of the worse answer.
        weight_P: 1 / C(K, 2), K being the number of answers to the prompt.
        example_P: the prompt.
    """

    better_P: Tensor
    worse_P: Tensor
    weight_P: Tensor
    example_P: Tensor


def ranked_pairs(rank_Q: Tensor, example_Q: Tensor) -> RankedPairs:
    """List every pair that the ranks decide; ties make no pair.

    All pairs of a prompt stay in one batch element, each weighted 1 / C(K, 2), so that a prompt with nine answers does
    not outvote one with two, and no answer is seen K - 1 times an epoch as shuffled pairs would be: those over-fit
    within a single pass.

    Args:
        rank_Q: rank of each answer, lower is better. Shape (Q,).
        example_Q: prompt of each answer. Shape (Q,).

    Source: Ouyang et al. 2022, "Training language models to follow instructions with human feedback", section 3.5
    and equation 1.
    """
    return _pairs(rank_Q[:, None] < rank_Q[None, :], example_Q)


def tied_pairs(rank_Q: Tensor, example_Q: Tensor) -> RankedPairs:
    """List every pair of answers to one prompt that share a rank, each once; see `ranked_pairs`."""
    return _pairs((rank_Q[:, None] == rank_Q[None, :]).triu(1), example_Q)


def answer_pairs(example_Q: Tensor) -> RankedPairs:
    """List every two answers to one prompt, each once, the earlier in the list as `better_P`; see `ranked_pairs`."""
    return _pairs(torch.ones_like(example_Q[:, None] == example_Q[None, :]).triu(1), example_Q)


def judged_pairs(
    rank_Q: Tensor, example_Q: Tensor, share_P: Tensor | None = None
) -> tuple[RankedPairs, Tensor | float]:
    """List the pairs that people judged, and the share of them that prefers `better_P`.

    Args:
        rank_Q: rank of each answer, lower is better. Shape (Q,).
        example_Q: prompt of each answer. Shape (Q,).
        share_P: share of the judgements in favour of the first of each two answers, in the order of `answer_pairs`;
            NaN where the ranks alone decide. None for ranks alone.

    Returns:
        The pairs that ranks decide, and 1; or, with shares, those of `answer_pairs` that ranks or people decide, the
        earlier answer as `better_P`, with a share in [0, 1]. People who disagree one to one make a pair, a tie in rank
        makes none.
    """
    if share_P is None:
        return ranked_pairs(rank_Q, example_Q), 1.0
    pairs = answer_pairs(example_Q)
    ahead_P, told_P = rank_Q[pairs.worse_P] - rank_Q[pairs.better_P], ~share_P.isnan()
    share_P = torch.where(told_P, share_P, (ahead_P > 0).to(share_P))
    judged_P = told_P | (ahead_P != 0)
    return RankedPairs(*(x[judged_P] for x in pairs)), share_P[judged_P]


def _pairs(which_QQ: Tensor, example_Q: Tensor) -> RankedPairs:
    same_QQ = example_Q[:, None] == example_Q[None, :]
    better_P, worse_P = torch.nonzero(same_QQ & which_QQ, as_tuple=True)
    answers_P = same_QQ.sum(1)[better_P].to(torch.get_default_dtype())
    return RankedPairs(better_P, worse_P, 2.0 / (answers_P * (answers_P - 1.0)), example_Q[better_P])


def bradley_terry_loss(
    better_P: Tensor,
    worse_P: Tensor,
    margin_P: Tensor | float = 0.0,
    label_smoothing: float = 0.0,
    centering: float = 0.0,
    share_P: Tensor | float = 1.0,
) -> Tensor:
    """-log sigmoid(better - worse - margin), per pair.

    Args:
        better_P: score of the preferred answer. Shape (P,).
        worse_P: score of the other. Shape (P,).
        margin_P: how far apart the scores should at least be (Touvron et al. 2023, "Llama 2", equation 2).
        label_smoothing: probability that a label is wrong, in [0, 0.5).
        centering: weight of (better + worse)^2, which fixes the free constant of the scores near 0 (Eisenstein et al.
            2023, "Helping or Herding?", equation 2).
        share_P: share of the judgements that prefer the better answer, see `soft_label_loss`. Shape (P,).

    Returns:
        Shape (P,), in nats.

    Raises:
        ValueError: label_smoothing out of range.

    Source: Bradley and Terry 1952; Stiennon et al. 2020, "Learning to summarize from human feedback", section 3.4.
    """
    if not 0.0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must be in [0, 0.5), got {label_smoothing}")
    share_P = (1.0 - label_smoothing) * share_P + label_smoothing * (1.0 - share_P)
    loss_P = soft_label_loss(better_P - margin_P, worse_P, share_P)
    return loss_P + centering * (better_P + worse_P).square()


def soft_label_loss(first_P: Tensor, second_P: Tensor, share_P: Tensor | float) -> Tensor:
    """Bradley-Terry where a pair was judged more than once: cross-entropy with the share that prefers the first.

    A share of 1 is `bradley_terry_loss`; 1/2, people who disagree or call a tie, pulls the two scores together.

    Args:
        first_P: score of one answer. Shape (P,).
        second_P: score of the other. Shape (P,).
        share_P: share of the judgements, or probability, in favour of the first, in [0, 1]. Shape (P,).

    Returns:
        Shape (P,), in nats; at least the entropy of the share.

    Source: Bradley and Terry 1952, "Rank Analysis of Incomplete Block Designs" (likelihood of counts, per judgement).
    """
    gap_P = first_P - second_P
    return -share_P * logsigmoid(gap_P) - (1.0 - share_P) * logsigmoid(-gap_P)


def regression_loss(score_Q: Tensor, target_Q: Tensor) -> Tensor:
    """(score - target)^2: for answers with grades of their own, which fix the scale that comparisons leave open.

    Args:
        score_Q: score of each answer. Shape (Q,).
        target_Q: its grade. Shape (Q,).

    Returns:
        Shape (Q,), in squared units of the grade.

    Source: Wang et al. 2024, "HelpSteer2: Open-source dataset for training top-performing reward models", section 3.
    """
    return (score_Q - target_Q).square()


def plackett_luce_loss(score_Q: Tensor, rank_Q: Tensor, example_Q: Tensor, num_examples: int) -> Tensor:
    """Negative log-likelihood of whole rankings: the best is chosen from all, the second from the rest, and so on.

    With two answers it is Bradley-Terry. Tied answers each compete with their tie and everything ranked below
    (Breslow's approximation).

    Args:
        score_Q: score of each answer. Shape (Q,).
        rank_Q: rank of each answer, lower is better. Shape (Q,).
        example_Q: prompt of each answer. Shape (Q,).
        num_examples: E.

    Returns:
        Shape (E,), in nats.

    Source: Plackett 1975, "The Analysis of Permutations"; as a loss: Rafailov et al. 2023, "Direct Preference
    Optimization", appendix A.3, equation 18. Ties: Breslow 1974, "Covariance Analysis of Censored Survival Data".
    """
    competes_QQ = (example_Q[:, None] == example_Q[None, :]) & (rank_Q[None, :] >= rank_Q[:, None])
    field_QQ = torch.where(competes_QQ, score_Q[None, :], -torch.inf)
    return score_Q.new_zeros(num_examples).index_add(0, example_Q, field_QQ.logsumexp(1) - score_Q)


def davidson_tie_loss(first_P: Tensor, second_P: Tensor, log_tie: Tensor | float = 0.0) -> Tensor:
    """Negative log-likelihood that two answers tie, in Davidson's extension of Bradley-Terry.

    P(tie) = nu sqrt(a b) / (a + b + nu sqrt(a b)) with a = exp(first), b = exp(second): likeliest at equal scores.

    Args:
        first_P: score of one answer. Shape (P,).
        second_P: score of the other. Shape (P,).
        log_tie: log nu, how readily people call a tie.

    Returns:
        Shape (P,), in nats.

    Source: Davidson 1970, "On Extending the Bradley-Terry Model to Accommodate Ties in Paired Comparisons".
    """
    tie_P = log_tie + 0.5 * (first_P + second_P)
    return torch.stack([first_P, second_P, tie_P]).logsumexp(0) - tie_P


def davidson_win_loss(better_P: Tensor, worse_P: Tensor, log_tie: Tensor | float = 0.0) -> Tensor:
    """Negative log-likelihood that the better answer wins where ties are possible; see `davidson_tie_loss`."""
    tie_P = log_tie + 0.5 * (better_P + worse_P)
    return torch.stack([better_P, worse_P, tie_P]).logsumexp(0) - better_P
