"""What several people said of the answers to a prompt: a share for each two answers, in the order 12, 13, ... 23 ..."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, product
from statistics import fmean


def shares_of(rankings: Sequence[Sequence[float]]) -> list[float]:
    """Share of people who rank the first of two answers above the second; a tie counts half for each.

    Args:
        rankings: what each person says of all answers, lower is better.
    """
    return [
        fmean(0.5 if ranks[i] == ranks[j] else float(ranks[i] < ranks[j]) for ranks in rankings)
        for i, j in combinations(range(len(rankings[0])), 2)
    ]


def ranks_of(shares: Sequence[float], answers: int) -> list[float]:
    """One ranking out of shares: how many of the others are preferred to an answer, in the mean (Borda's count)."""
    ranks = [0.0] * answers
    for (i, j), share in zip(combinations(range(answers), 2), shares, strict=True):
        ranks[i] += 1.0 - share
        ranks[j] += share
    return [round(rank, 9) for rank in ranks]  # no last bit decides a tie


def merged_shares(shares: Sequence[float], groups: Sequence[Sequence[int]]) -> list[float]:
    """Shares between groups of answers, each of which is one answer: the mean over their members."""
    answers = sum(map(len, groups))
    of = dict(zip(combinations(range(answers), 2), shares, strict=True))
    return [
        fmean(of[i, j] if i < j else 1.0 - of[j, i] for i, j in product(one, other))
        for one, other in combinations(groups, 2)
    ]
