"""Losses for reward models with more to learn from than which answer is better: shares of votes, and grades.

A mutant that a test was seen to kill is named above it.
"""

import math

import torch
from torch import Tensor
from torch.testing import assert_close

from lit_align.functional.reward import bradley_terry_loss, regression_loss, soft_label_loss


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
