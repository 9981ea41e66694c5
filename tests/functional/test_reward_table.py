"""Every loss of reward models through one table: its value by hand, its gradient, and what must not matter.

Two prompts, of three answers and of two, as RewardModule sees them: the losses of all pairs of a prompt, weighted. TRL
has the first three of them and is compared in `test_parity_trl.py`. A mutant that a test was seen to kill is named
above it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from lit_align.functional.reward import (
    answer_pairs,
    bradley_terry_loss,
    davidson_tie_loss,
    davidson_win_loss,
    judged_pairs,
    plackett_luce_loss,
    ranked_pairs,
    regression_loss,
    tied_pairs,
)


class Answers(NamedTuple):
    """What is known of the answers, each in a list of one prompt's."""

    scores: list[list[float]]
    ranks: list[list[float]]
    margins: list[list[float]]
    grades: list[list[float]]
    shares: list[list[float]]  # of 12, 13, 23


ALL = Answers(
    scores=[[1.0, -0.5, 2.0], [0.3, 0.8]],
    ranks=[[0.0, 1.0, 1.0], [1.0, 0.0]],
    margins=[[0.5, 0.2, 0.0], [0.0, 0.1]],
    grades=[[2.0, 0.0, 1.0], [-1.0, 0.8]],
    shares=[[0.75, 1.0, 0.5], [0.2]],
)


def flat(values: list[list[float]]) -> Tensor:
    return torch.tensor([value for of_prompt in values for value in of_prompt], dtype=torch.float64)


def examples(values: list[list[float]]) -> Tensor:
    return torch.arange(len(values)).repeat_interleave(torch.tensor([len(of_prompt) for of_prompt in values]))


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


Loss = Callable[[Tensor, Answers], Tensor]


def pairwise(**options: float) -> Loss:
    """bradley_terry, as RewardModule has it."""
    shared, with_margins = options.pop("shares", 0), options.pop("margins", 0)

    def loss(score_Q: Tensor, of: Answers) -> Tensor:
        example_Q, rank_Q, margin_Q = examples(of.ranks), flat(of.ranks), flat(of.margins) * with_margins
        pairs, share_P = judged_pairs(rank_Q, example_Q, flat(of.shares) if shared else None)
        margin_P = margin_Q[pairs.better_P] - margin_Q[pairs.worse_P]
        better_P, worse_P = score_Q[pairs.better_P], score_Q[pairs.worse_P]
        return (pairs.weight_P * bradley_terry_loss(better_P, worse_P, margin_P, share_P=share_P, **options)).sum()

    return loss


def davidson(score_Q: Tensor, of: Answers) -> Tensor:
    example_Q, rank_Q = examples(of.ranks), flat(of.ranks)
    pairs, ties = ranked_pairs(rank_Q, example_Q), tied_pairs(rank_Q, example_Q)
    win_P = davidson_win_loss(score_Q[pairs.better_P], score_Q[pairs.worse_P], 0.4)
    tie_P = davidson_tie_loss(score_Q[ties.better_P], score_Q[ties.worse_P], 0.4)
    return (pairs.weight_P * win_P).sum() + (ties.weight_P * tie_P).sum()


def plackett_luce(score_Q: Tensor, of: Answers) -> Tensor:
    return plackett_luce_loss(score_Q, flat(of.ranks), examples(of.ranks), len(of.ranks)).sum()


def regression(score_Q: Tensor, of: Answers) -> Tensor:
    example_Q = examples(of.ranks)
    return (regression_loss(score_Q, flat(of.grades)) / torch.bincount(example_Q)[example_Q]).sum()


class Row(NamedTuple):
    """A loss, its value, the sign of its gradient for each answer (0: not told), and whether a shift changes it."""

    loss: Loss
    value: float
    signs: list[int]
    shifts: bool = False


# Pairs that ranks decide: 1 over 2 (gap 1.5), 1 over 3 (-1), each a third; 5 over 4 (gap 0.5). 2 and 3 tie.
PLAIN = (softplus(-1.5) + softplus(1.0)) / 3 + softplus(-0.5)
FLIPPED = (softplus(1.5) + softplus(-1.0)) / 3 + softplus(0.5)
NU = math.exp(0.4)


def davidson_nll(chosen: float, one: float, other: float) -> float:
    tie = NU * math.exp((one + other) / 2)
    return math.log(math.exp(one) + math.exp(other) + tie) - chosen


TABLE = {
    "bradley_terry": Row(pairwise(), PLAIN, [-1, 1, 1, 1, -1]),
    # Margins 0.3 and 0.5, 0.1.
    "margin": Row(
        pairwise(margins=1), (softplus(-1.2) + softplus(1.5)) / 3 + softplus(-0.4), [-1, 1, 1, 1, -1]
    ),
    # Squares of the sums 0.5, 3 and 1.1, as pairs weigh.
    "centering": Row(pairwise(centering=0.1), PLAIN + 0.1 * ((0.25 + 9.0) / 3 + 1.21), [0, 1, 1, 1, 0], shifts=True),
    "label_smoothing": Row(pairwise(label_smoothing=0.1), 0.9 * PLAIN + 0.1 * FLIPPED, [-1, 1, 1, 1, -1]),
    # Three people of four for 1 over 2, all for 1 over 3, one to one between 2 and 3 (gap -2.5); four of five for 5.
    "shares": Row(
        pairwise(shares=1),
        (0.75 * softplus(-1.5) + 0.25 * softplus(1.5) + softplus(1.0) + 0.5 * (softplus(2.5) + softplus(-2.5))) / 3
        + 0.8 * softplus(-0.5)
        + 0.2 * softplus(0.5),
        [-1, 0, 1, 1, -1],
    ),
    # The tied answers each compete with both of them.
    "plackett_luce": Row(
        plackett_luce,
        math.log(math.exp(1.0) + math.exp(-0.5) + math.exp(2.0)) - 1.0
        + 2 * math.log(math.exp(-0.5) + math.exp(2.0)) + 0.5 - 2.0
        + softplus(-0.5),
        [-1, 0, 1, 1, -1],
    ),
    "davidson": Row(
        davidson,
        (davidson_nll(1.0, 1.0, -0.5) + davidson_nll(1.0, 1.0, 2.0) + davidson_nll(math.log(NU) + 0.75, -0.5, 2.0)) / 3
        + davidson_nll(0.8, 0.3, 0.8),
        [-1, 0, 1, 1, -1],
    ),
    # Distances -1, -0.5, 1 and 1.3, 0: towards the grade, and a third or a half of it.
    "regression": Row(regression, (1.0 + 0.25 + 1.0) / 3 + 1.69 / 2, [-1, -1, 1, 1, 0], shifts=True),
}  # fmt: skip


# Kills: gap turned; weights 1 / K, none; margins added, or of one side; centering of the difference; smoothing twice;
# shares of the other answer; own field left out (plackett_luce); sqrt dropped (davidson); half the square (regression).
@pytest.mark.parametrize("name", TABLE)
def test_value_by_hand(name: str) -> None:
    row = TABLE[name]
    assert row.loss(flat(ALL.scores), ALL).item() == pytest.approx(row.value, abs=1e-7)  # weights are fp32


# Kills: detached scores; the sign of any loss.
@pytest.mark.parametrize("name", TABLE)
def test_gradient_is_that_of_finite_differences_and_points_the_right_way(name: str) -> None:
    row, score_Q = TABLE[name], flat(ALL.scores).requires_grad_()
    assert torch.autograd.gradcheck(lambda scores: row.loss(scores, ALL), score_Q)
    (gradient_Q,) = torch.autograd.grad(row.loss(score_Q, ALL), score_Q)
    for sign, slope in zip(row.signs, gradient_Q.tolist(), strict=True):
        assert sign == 0 or sign * slope > 0, (row.signs, gradient_Q)


@pytest.mark.parametrize("name", TABLE)
def test_a_shift_of_all_scores_of_a_prompt(name: str) -> None:
    row, score_Q = TABLE[name], flat(ALL.scores)
    shifted = row.loss(score_Q + torch.tensor([2.0, -3.0])[examples(ALL.scores)], ALL)
    assert (abs(shifted.item() - row.value) > 1e-3) == row.shifts


# Kills: pairs across prompts; weights by the whole batch.
@pytest.mark.parametrize("name", TABLE)
def test_prompts_add_up(name: str) -> None:
    row = TABLE[name]
    alone = [Answers(*([values[e]] for values in ALL)) for e in range(2)]
    total = sum(row.loss(flat(of.scores), of) for of in alone)
    assert_close(total, row.loss(flat(ALL.scores), ALL))


# Kills: shares that are not turned with their answers.
@pytest.mark.parametrize("name", TABLE)
def test_answers_have_no_order(name: str) -> None:
    row = TABLE[name]
    for order in itertools.permutations(range(3)):
        pairs = dict(zip(itertools.combinations(range(3), 2), ALL.shares[0], strict=True))
        shares = [
            pairs[order[i], order[j]] if order[i] < order[j] else 1.0 - pairs[order[j], order[i]]
            for i, j in itertools.combinations(range(3), 2)
        ]
        turned = [[[values[0][k] for k in order], values[1]] for values in ALL[:4]]
        moved = Answers(*turned, [shares, ALL.shares[1]])
        assert_close(row.loss(flat(moved.scores), moved), row.loss(flat(ALL.scores), ALL))
    assert len(answer_pairs(examples(ALL.ranks)).better_P) == 4
