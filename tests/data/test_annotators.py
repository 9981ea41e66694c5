"""Several people's rankings as shares, and back to one ranking."""

import itertools

import pytest
from data.fuzz import fuzz
from hypothesis import given
from hypothesis import strategies as st

from lit_align.data.votes import merged_shares, ranks_of, shares_of

RANKINGS = st.integers(2, 5).flatmap(
    lambda k: st.lists(st.lists(st.integers(0, 3), min_size=k, max_size=k), min_size=1, max_size=4)
)


# Kills: a tie as a win or as nothing; > for <; the first person alone.
def test_shares_by_hand() -> None:
    # Two of three prefer the first to the second; one of them ties the second and the third.
    assert shares_of([[0, 1, 2], [1, 0, 2], [0, 1, 1]]) == pytest.approx([2 / 3, 1.0, 2.5 / 3])


# Kills: shares of the wrong answer added; 1 - share and share exchanged.
@fuzz
@given(RANKINGS)
def test_one_ranking_of_many_is_the_mean_of_theirs(rankings: list[list[int]]) -> None:
    answers = len(rankings[0])

    def above(ranks: list[int], i: int) -> float:
        return sum(1.0 if rank < ranks[i] else 0.5 for j, rank in enumerate(ranks) if j != i and rank <= ranks[i])

    expected = [sum(above(ranks, i) for ranks in rankings) / len(rankings) for i in range(answers)]
    assert ranks_of(shares_of(rankings), answers) == pytest.approx(expected)


# Kills: rounding dropped, which leaves the first two 1e-16 apart.
def test_what_ties_in_the_mean_ties() -> None:
    assert ranks_of(shares_of([[0, 1, 2], [0, 1, 2], [2, 0, 1]]), 3) == [0.666666667, 0.666666667, 1.666666667]
    assert len(set(ranks_of(shares_of([[0, 1, 2], [1, 2, 0], [2, 0, 1]]), 3))) == 1


@fuzz
@given(RANKINGS)
def test_groups_of_one_change_nothing(rankings: list[list[int]]) -> None:
    shares = shares_of(rankings)
    assert merged_shares(shares, [[k] for k in range(len(rankings[0]))]) == pytest.approx(shares)
    turned = merged_shares(shares, [[k] for k in reversed(range(len(rankings[0])))])
    reordered = shares_of([ranks[::-1] for ranks in rankings])
    assert turned == pytest.approx(reordered)
    assert len(shares) == len(list(itertools.combinations(rankings[0], 2)))
