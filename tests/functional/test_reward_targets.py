"""Losses for reward models with more to learn from than which answer is better: shares of votes, and grades.

A mutant that a test was seen to kill is named above it.
"""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from lit_align.functional.reward import (
    answer_pairs,
    bradley_terry_loss,
    judged_pairs,
    ranked_pairs,
    regression_loss,
    soft_label_loss,
)


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# Kills: shares exchanged; sum for difference; second term dropped.
def test_soft_labels_by_hand() -> None:
    first_P, second_P = double(1.0, 1.0, 1.0), double(0.5, 0.5, 0.5)
    lose, win = math.log1p(math.exp(0.5)), math.log1p(math.exp(-0.5))
    loss_P = soft_label_loss(first_P, second_P, double(1.0, 0.75, 0.0))
    assert_close(loss_P, double(win, 0.75 * win + 0.25 * lose, lose))
    assert_close(loss_P[:1], bradley_terry_loss(first_P[:1], second_P[:1]))


def test_soft_labels_are_fitted_where_the_scores_give_the_share() -> None:
    share_P = double(0.5, 0.9, 0.01)
    first_P = share_P.logit().requires_grad_()
    loss_P = soft_label_loss(first_P, torch.zeros(3, dtype=torch.float64), share_P)
    (gradient_P,) = torch.autograd.grad(loss_P.sum(), first_P)
    assert gradient_P.abs().max() < 1e-12
    assert_close(loss_P, -share_P * share_P.log() - (1 - share_P) * (1 - share_P).log())


def test_two_votes_one_each_way_are_one_soft_label() -> None:
    first_P, second_P = double(2.0, -1.0), double(0.3, 4.0)
    both_P = bradley_terry_loss(first_P, second_P) + bradley_terry_loss(second_P, first_P)
    assert_close(soft_label_loss(first_P, second_P, double(0.5, 0.5)), 0.5 * both_P)


# Kills: abs for square; half of it; sum for difference.
def test_regression_by_hand() -> None:
    score_Q = double(1.0, -2.0).requires_grad_()
    loss_Q = regression_loss(score_Q, double(4.0, -2.0))
    assert_close(loss_Q, double(9.0, 0.0))
    assert_close(torch.autograd.grad(loss_Q.sum(), score_Q)[0], double(-6.0, 0.0))


# Kills: triu(1) dropped or 0; example ignored.
def test_every_two_answers_are_listed_once_in_order() -> None:
    pairs = answer_pairs(torch.tensor([0, 0, 0, 1, 2, 2]))
    assert list(zip(pairs.better_P.tolist(), pairs.worse_P.tolist(), strict=True)) == [(0, 1), (0, 2), (1, 2), (4, 5)]
    assert_close(pairs.weight_P, torch.tensor([1 / 3] * 3 + [1.0]))


# Kills: NaN taken for a share; ranks the wrong way round; ties of ranks listed; people one to one left out.
def test_shares_stand_before_ranks() -> None:
    rank_Q, example_Q = torch.tensor([2.0, 1.0, 1.0, 0.0, 1.0]), torch.tensor([0, 0, 0, 1, 1])
    share_P = torch.tensor([math.nan, 0.5, math.nan, 0.25])
    pairs, share_P = judged_pairs(rank_Q, example_Q, share_P)
    assert list(zip(pairs.better_P.tolist(), pairs.worse_P.tolist(), strict=True)) == [(0, 1), (0, 2), (3, 4)]
    assert share_P.tolist() == [0.0, 0.5, 0.25]
    assert_close(pairs.weight_P, torch.tensor([1 / 3, 1 / 3, 1.0]))
    assert pairs.example_P.tolist() == [0, 0, 1]


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=5), min_size=1, max_size=4), st.sampled_from([0, 0.1]))
def test_without_a_share_the_loss_is_that_of_the_ranks(rankings: list[list[int]], label_smoothing: float) -> None:
    rank_Q = torch.tensor([rank for ranks in rankings for rank in ranks])
    example_Q = torch.arange(len(rankings)).repeat_interleave(torch.tensor([len(ranks) for ranks in rankings]))
    score_Q, margin_Q = torch.randn(2, len(rank_Q), generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def total(share_P: Tensor | None) -> Tensor:
        pairs, share_P = judged_pairs(rank_Q, example_Q, share_P)
        better_P, worse_P = score_Q[pairs.better_P], score_Q[pairs.worse_P]
        margin_P = margin_Q[pairs.better_P] - margin_Q[pairs.worse_P]
        return (pairs.weight_P * bradley_terry_loss(better_P, worse_P, margin_P, label_smoothing, 0.01, share_P)).sum()

    nothing_P = torch.full((answer_pairs(example_Q).better_P.numel(),), math.nan, dtype=torch.float64)
    assert_close(total(nothing_P), total(None))
    assert judged_pairs(rank_Q, example_Q)[0].better_P.tolist() == ranked_pairs(rank_Q, example_Q).better_P.tolist()


# Kills: share not smoothed; smoothed once too often; margin on the wrong side; the share of the other answer.
def test_bradley_terry_with_a_share_margin_and_smoothing_by_hand() -> None:
    # Gap 2 - 1 - 0.5; a share of 0.75, labels wrong one time in ten: 0.9 * 0.75 + 0.1 * 0.25 = 0.7.
    win, lose = math.log1p(math.exp(-0.5)), math.log1p(math.exp(0.5))
    loss_P = bradley_terry_loss(double(2.0), double(1.0), 0.5, 0.1, 0.0, double(0.75))
    assert_close(loss_P, double(0.7 * win + 0.3 * lose))
    # From the other side it is the same pair.
    assert_close(bradley_terry_loss(double(1.0), double(2.0), -0.5, 0.1, 0.0, double(0.25)), loss_P)


@pytest.mark.parametrize("people", [1, 2, 3, 5])
def test_several_people_weigh_as_one(people: int) -> None:
    """A row for each person, or one row with the share of them: the same loss, once divided by the people."""
    gap = double(0.8)
    for votes in itertools.product([True, False], repeat=people):
        rows = [bradley_terry_loss(gap, double(0.0)) if v else bradley_terry_loss(double(0.0), gap) for v in votes]
        share = double(sum(votes) / people)
        assert_close(bradley_terry_loss(gap, double(0.0), share_P=share), torch.stack(rows).mean(0))
