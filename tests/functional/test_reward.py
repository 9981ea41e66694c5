"""Losses for reward models: pairs, Bradley-Terry, Plackett-Luce, ties.

A mutant that a test was seen to kill is named above it.
"""

import itertools
import math
from collections import defaultdict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from lit_align.functional.reward import (
    RankedPairs,
    bradley_terry_loss,
    davidson_tie_loss,
    davidson_win_loss,
    plackett_luce_loss,
    ranked_pairs,
    tied_pairs,
)

# Ranks of the answers of each prompt.
RANKINGS = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=5), min_size=1, max_size=4)


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def flat(rankings: list[list[int]]) -> tuple[Tensor, Tensor]:
    rank_Q = torch.tensor([rank for ranks in rankings for rank in ranks])
    return rank_Q, torch.arange(len(rankings)).repeat_interleave(torch.tensor([len(ranks) for ranks in rankings]))


def listed(pairs: RankedPairs) -> list[tuple[int, int]]:
    return list(zip(pairs.better_P.tolist(), pairs.worse_P.tolist(), strict=True))


# Kills: < -> > (better and worse swapped); < -> <=; example ignored; weights 1 / (K - 1), 1 / K, 1 / (K (K - 1)).
def test_pairs_of_three_prompts_by_hand() -> None:
    # Four answers, the second and third tied; two answers; one answer.
    rank_Q, example_Q = flat([[2, 1, 1, 0], [0, 1], [0]])
    pairs = ranked_pairs(rank_Q, example_Q)
    assert listed(pairs) == [(1, 0), (2, 0), (3, 0), (3, 1), (3, 2), (4, 5)]
    assert_close(pairs.weight_P, torch.tensor([1 / 6] * 5 + [1.0]))
    assert pairs.example_P.tolist() == [0] * 5 + [1]
    ties = tied_pairs(rank_Q, example_Q)
    assert listed(ties) == [(1, 2)]
    assert_close(ties.weight_P, torch.tensor([1 / 6]))
    assert ties.example_P.tolist() == [0]


# Kills: triu(1) -> triu(0) or nothing (a pair listed twice, an answer tied with itself); weight without the factor 2.
@settings(max_examples=50, deadline=None, derandomize=True)
@given(RANKINGS)
def test_pairs_and_ties_list_each_two_answers_of_a_prompt_once_and_weigh_1_in_total(rankings: list[list[int]]) -> None:
    rank_Q, example_Q = flat(rankings)
    pairs, ties = ranked_pairs(rank_Q, example_Q), tied_pairs(rank_Q, example_Q)
    seen = [frozenset(pair) for pair in listed(pairs) + listed(ties)]
    of_one_prompt = itertools.combinations(range(len(rank_Q)), 2)
    assert sorted(map(sorted, seen)) == sorted(
        map(list, (p for p in of_one_prompt if example_Q[p[0]] == example_Q[p[1]]))
    )
    assert all(rank_Q[better] < rank_Q[worse] for better, worse in listed(pairs))
    assert all(rank_Q[first] == rank_Q[second] for first, second in listed(ties))
    weight: dict[int, float] = defaultdict(float)
    for kind in (pairs, ties):
        for example, w in zip(kind.example_P.tolist(), kind.weight_P.tolist(), strict=True):
            weight[example] += w
    assert weight == pytest.approx({e: 1.0 for e, ranks in enumerate(rankings) if len(ranks) > 1})


def test_answers_of_a_prompt_need_not_stand_together() -> None:
    pairs = ranked_pairs(torch.tensor([0, 1, 1, 0]), torch.tensor([0, 1, 0, 1]))
    assert listed(pairs) == [(0, 2), (3, 1)]
    assert pairs.weight_P.tolist() == [1.0, 1.0]


# Kills: sign of the gap; margin added; margin dropped; centering with a difference, without the square, dropped.
def test_bradley_terry_by_hand() -> None:
    better_P, worse_P = double(2.0, 0.0), double(1.0, 3.0)
    # -log sigmoid(1) = log(1 + e^-1); -log sigmoid(-3) = log(1 + e^3).
    plain = [math.log1p(math.exp(-1.0)), math.log1p(math.exp(3.0))]
    assert_close(bradley_terry_loss(better_P, worse_P), double(*plain))
    # Margins 0.5 and 1: gaps 0.5 and -4.
    assert_close(
        bradley_terry_loss(better_P, worse_P, double(0.5, 1.0)),
        double(math.log1p(math.exp(-0.5)), math.log1p(math.exp(4.0))),
    )
    # Sums 3 and 3: 0.1 * 9 on top.
    assert_close(bradley_terry_loss(better_P, worse_P, centering=0.1), double(*plain) + 0.9)
    # A label wrong one time in ten: 0.9 * loss + 0.1 * (loss of the flipped pair).
    smoothed = [0.9 * plain[0] + 0.1 * math.log1p(math.exp(1.0)), 0.9 * plain[1] + 0.1 * math.log1p(math.exp(-3.0))]
    assert_close(bradley_terry_loss(better_P, worse_P, label_smoothing=0.1), double(*smoothed))


def test_bradley_terry_at_equal_scores_is_log_2_with_slope_one_half() -> None:
    scores_2P = torch.ones(2, 3, dtype=torch.float64, requires_grad=True)
    loss_P = bradley_terry_loss(scores_2P[0], scores_2P[1])
    assert_close(loss_P, torch.full_like(loss_P, math.log(2.0)))
    (gradient_2P,) = torch.autograd.grad(loss_P.sum(), scores_2P)
    assert_close(gradient_2P, double(-0.5, 0.5)[:, None].expand(2, 3))


def test_bradley_terry_sees_only_the_difference_of_scores() -> None:
    better_P, worse_P = torch.randn(2, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    loss_P = bradley_terry_loss(better_P, worse_P, 0.3, label_smoothing=0.1)
    assert_close(bradley_terry_loss(better_P + 5.0, worse_P + 5.0, 0.3, label_smoothing=0.1), loss_P)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(1))
    assert_close(bradley_terry_loss(better_P[order], worse_P[order], 0.3, label_smoothing=0.1), loss_P[order])


# Kills: flipped smoothing weights.
def test_smoothed_bradley_terry_is_least_where_the_model_believes_the_noise() -> None:
    gap = torch.tensor(math.log(0.9 / 0.1), dtype=torch.float64, requires_grad=True)  # sigmoid(gap) = 0.9
    (gradient,) = torch.autograd.grad(bradley_terry_loss(gap, torch.zeros_like(gap), label_smoothing=0.1), gap)
    assert abs(gradient.item()) < 1e-12


def test_a_hopeless_pair_has_a_finite_loss_and_gradient() -> None:
    better_P = torch.tensor([-1e4], requires_grad=True)
    loss_P = bradley_terry_loss(better_P, torch.tensor([1e4]))
    assert loss_P.item() == pytest.approx(2e4)
    assert torch.autograd.grad(loss_P.sum(), better_P)[0].item() == -1.0


# Kills: range check dropped; 0.5 let through.
@pytest.mark.parametrize("label_smoothing", [-0.1, 0.5, 0.9])
def test_label_smoothing_out_of_range_is_an_error(label_smoothing: float) -> None:
    with pytest.raises(ValueError, match="label_smoothing"):
        bradley_terry_loss(torch.zeros(1), torch.zeros(1), label_smoothing=label_smoothing)


# Kills: > for >= (an answer left out of its own field); field of everything ranked above; example ignored.
def test_plackett_luce_by_hand() -> None:
    # Strengths 1, 2, 3 for ranks 2, 0, 1: 2 / (2 + 3 + 1) * 3 / (3 + 1) * 1 = 1/4. Second prompt: 1 / (1 + 4).
    score_Q = double(1, 2, 3, 4, 1).log()
    rank_Q, example_Q = flat([[2, 0, 1], [1, 0]])
    assert_close(plackett_luce_loss(score_Q, rank_Q, example_Q, 2), -double(1 / 4, 1 / 5).log())


def test_plackett_luce_of_two_answers_is_bradley_terry() -> None:
    score_Q = torch.randn(12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rank_Q, example_Q = flat([[0, 1], [1, 0]] * 3)
    pairs = ranked_pairs(rank_Q, example_Q)
    expected_E = bradley_terry_loss(score_Q[pairs.better_P], score_Q[pairs.worse_P])
    assert_close(plackett_luce_loss(score_Q, rank_Q, example_Q, 6), expected_E)


def test_chances_of_all_rankings_of_four_answers_sum_to_1() -> None:
    score_Q = double(0.3, -1.2, 2.0, 0.7)
    rankings = [torch.tensor(ranks) for ranks in itertools.permutations(range(4))]
    example_Q = torch.zeros(4, dtype=torch.long)
    losses = torch.cat([plackett_luce_loss(score_Q, rank_Q, example_Q, 1) for rank_Q in rankings])
    assert_close(losses.neg().exp().sum(), torch.tensor(1.0, dtype=torch.float64))
    # All scores equal: each of the 4! rankings has the same chance.
    even = plackett_luce_loss(torch.zeros(4), rankings[7], example_Q, 1)
    assert_close(even, torch.tensor([math.log(24.0)]))


# Kills: ties left out of the field.
def test_tied_answers_compete_with_their_tie_and_all_below() -> None:
    # Strengths 2 and 3 tie above 5 : Breslow gives 2 / 10 * 3 / 10 * 1.
    loss_E = plackett_luce_loss(double(2, 3, 5).log(), torch.tensor([0, 0, 1]), torch.zeros(3, dtype=torch.long), 1)
    assert_close(loss_E, -double(0.06).log())


@settings(max_examples=30, deadline=None, derandomize=True)
@given(RANKINGS)
def test_plackett_luce_is_free_of_the_order_and_of_each_prompts_constant(rankings: list[list[int]]) -> None:
    rank_Q, example_Q = flat(rankings)
    generator = torch.Generator().manual_seed(len(rank_Q))
    score_Q = torch.randn(len(rank_Q), generator=generator, dtype=torch.float64)
    loss_E = plackett_luce_loss(score_Q, rank_Q, example_Q, len(rankings))
    assert (loss_E >= -1e-12).all()
    shift_E = torch.randn(len(rankings), generator=generator, dtype=torch.float64)
    assert_close(plackett_luce_loss(score_Q + shift_E[example_Q], rank_Q, example_Q, len(rankings)), loss_E)
    order = torch.randperm(len(rank_Q), generator=generator)
    assert_close(plackett_luce_loss(score_Q[order], rank_Q[order], example_Q[order], len(rankings)), loss_E)
    # Only the order of the ranks matters.
    assert_close(plackett_luce_loss(score_Q, 10 * rank_Q - 3, example_Q, len(rankings)), loss_E)


def test_plackett_luce_gradient_is_chance_minus_choice() -> None:
    score_Q = double(1, 2, 3).log().requires_grad_()
    loss_E = plackett_luce_loss(score_Q, torch.tensor([0, 1, 2]), torch.zeros(3, dtype=torch.long), 1)
    (gradient_Q,) = torch.autograd.grad(loss_E.sum(), score_Q)
    # First choice among 1/6, 2/6, 3/6, second among 2/5, 3/5, third alone.
    assert_close(gradient_Q, double(1 / 6 - 1, 2 / 6 + 2 / 5 - 1, 3 / 6 + 3 / 5 + 1 - 1))


# Kills: sqrt dropped (factor 0.5); log_tie left out of the numerator or the denominator.
def test_davidson_by_hand() -> None:
    # a = 4, b = 1, nu = 3: a + b + nu sqrt(a b) = 4 + 1 + 6 = 11.
    first_P, second_P, log_tie = double(4.0).log(), double(1.0).log(), math.log(3.0)
    assert_close(davidson_win_loss(first_P, second_P, log_tie), -double(4 / 11).log())
    assert_close(davidson_win_loss(second_P, first_P, log_tie), -double(1 / 11).log())
    assert_close(davidson_tie_loss(first_P, second_P, log_tie), -double(6 / 11).log())


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.floats(-20, 20), st.floats(-20, 20), st.floats(-5, 5))
def test_davidson_win_loss_and_tie_sum_to_1(first: float, second: float, log_tie: float) -> None:
    first_P, second_P = double(first), double(second)
    losses = [
        davidson_win_loss(first_P, second_P, log_tie),
        davidson_win_loss(second_P, first_P, log_tie),
        davidson_tie_loss(first_P, second_P, log_tie),
    ]
    assert_close(torch.cat(losses).neg().exp().sum(), torch.tensor(1.0, dtype=torch.float64))
    shifted = davidson_tie_loss(first_P + 3.0, second_P + 3.0, log_tie)
    assert_close(shifted, losses[2])
    assert_close(davidson_tie_loss(second_P, first_P, log_tie), losses[2])


def test_davidson_without_ties_is_bradley_terry_and_a_tie_is_likeliest_at_equal_scores() -> None:
    first_P, second_P = double(0.7, -2.0), double(0.1, 1.0)
    assert_close(davidson_win_loss(first_P, second_P, -60.0), bradley_terry_loss(first_P, second_P))
    gap = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(davidson_tie_loss(gap, torch.zeros_like(gap)).sum(), gap)
    assert abs(gradient.item()) < 1e-12
    assert davidson_tie_loss(double(1.0), double(0.0)) > davidson_tie_loss(double(0.0), double(0.0))
