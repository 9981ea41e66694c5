"""Advantages and returns, against a double loop and closed forms; whitening against the published example.

A mutant that a test was seen to kill is named above it.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from lit_align.functional.advantage import gae, whiten

LENGTHS = st.lists(st.integers(0, 6), min_size=1, max_size=5).filter(any)


def episodes(lengths: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(sum(lengths))
    rewards_S, values_S = torch.randn(2, sum(lengths), generator=generator, dtype=torch.float64)
    return rewards_S, values_S, torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))


def by_episode(lengths: list[int], *tensors: Tensor) -> list[tuple[Tensor, ...]]:
    return list(zip(*(tensor.split(lengths) for tensor in tensors), strict=True))


# Kills: discount dropped from delta; lambda dropped; value sign; returns without the value; forward recursion;
# the value after an episode's end taken from the next episode.
def test_two_episodes_by_hand() -> None:
    rewards_S = torch.tensor([1.0, 0.0, 2.0, 3.0], dtype=torch.float64)
    values_S = torch.tensor([0.5, 1.0, 1.5, 4.0], dtype=torch.float64)
    advantages_S, returns_S = gae(rewards_S, values_S, torch.tensor([0, 0, 0, 1]), 2, discount=0.5, lambda_=0.5)
    # delta: 1 + 0.5 * 1 - 0.5 = 1; 0 + 0.5 * 1.5 - 1 = -0.25; 2 - 1.5 = 0.5; second episode 3 - 4 = -1.
    # A = delta + 0.25 A': 0.5; -0.25 + 0.125 = -0.125; 1 - 0.03125 = 0.96875.
    expected_S = torch.tensor([0.96875, -0.125, 0.5, -1.0], dtype=torch.float64)
    assert_close(advantages_S, expected_S)
    assert_close(returns_S, expected_S + values_S)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(LENGTHS, st.floats(0, 1), st.floats(0, 1))
def test_equals_the_double_sum_of_the_definition(lengths: list[int], discount: float, lambda_: float) -> None:
    rewards_S, values_S, sequence_S = episodes(lengths)
    expected = []
    for rewards, values in by_episode(lengths, rewards_S, values_S):
        length = len(rewards)
        for t in range(length):
            total = 0.0
            for k in range(t, length):
                after = values[k + 1].item() if k + 1 < length else 0.0
                total += (discount * lambda_) ** (k - t) * (rewards[k].item() + discount * after - values[k].item())
            expected.append(total)
    advantages_S, returns_S = gae(rewards_S, values_S, sequence_S, len(lengths), discount, lambda_)
    assert_close(advantages_S, torch.tensor(expected, dtype=torch.float64))
    assert_close(returns_S - values_S, advantages_S)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(LENGTHS)
def test_lambda_1_is_return_minus_value(lengths: list[int]) -> None:
    rewards_S, values_S, sequence_S = episodes(lengths)
    advantages_S, returns_S = gae(rewards_S, values_S, sequence_S, len(lengths), discount=1.0, lambda_=1.0)
    to_go_S = torch.cat([rewards.flip(0).cumsum(0).flip(0) for (rewards,) in by_episode(lengths, rewards_S)])
    assert_close(advantages_S, to_go_S - values_S)
    assert_close(returns_S, to_go_S)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(LENGTHS, st.floats(0, 1))
def test_lambda_0_is_the_one_step_error(lengths: list[int], discount: float) -> None:
    rewards_S, values_S, sequence_S = episodes(lengths)
    advantages_S, _ = gae(rewards_S, values_S, sequence_S, len(lengths), discount, lambda_=0.0)
    next_S = torch.cat([torch.cat([values[1:], values[:1] * 0]) for (values,) in by_episode(lengths, values_S)])
    assert_close(advantages_S, rewards_S + discount * next_S - values_S)


def test_a_perfect_value_has_no_advantage() -> None:
    rewards_S, _, sequence_S = episodes([4, 1, 3])
    values_S = torch.cat([rewards.flip(0).cumsum(0).flip(0) for rewards in rewards_S.split([4, 1, 3])])
    advantages_S, returns_S = gae(rewards_S, values_S, sequence_S, 3, discount=1.0, lambda_=0.95)
    assert_close(advantages_S, torch.zeros_like(advantages_S))
    assert_close(returns_S, values_S)


def test_defaults_are_discount_1_and_lambda_095() -> None:
    rewards_S, values_S, sequence_S = episodes([4, 2])
    assert torch.equal(
        gae(rewards_S, values_S, sequence_S, 2)[0], gae(rewards_S, values_S, sequence_S, 2, 1.0, 0.95)[0]
    )


def test_an_episode_does_not_see_the_others() -> None:
    lengths = [3, 0, 5, 1]
    rewards_S, values_S, sequence_S = episodes(lengths)
    together_S, _ = gae(rewards_S, values_S, sequence_S, 4, 0.9, 0.8)
    alone = [
        gae(rewards, values, torch.zeros(len(rewards), dtype=torch.long), 1, 0.9, 0.8)[0]
        for rewards, values in by_episode(lengths, rewards_S, values_S)
    ]
    assert_close(together_S, torch.cat(alone))


def test_no_episode_at_all_is_empty() -> None:
    empty_S = torch.zeros(0)
    advantages_S, returns_S = gae(empty_S, empty_S, torch.zeros(0, dtype=torch.long), 0)
    assert advantages_S.shape == returns_S.shape == (0,)


# Kills: unbiased variance (0.1394 .. 3.0606); shift_mean inverted; mean not added back.
def test_whitening_gives_the_published_numbers() -> None:
    # Huang et al. 2024, detail 18: 1.2, 1.3, ... 2.0 without shifting the mean gives 0.0508 .. 3.1492.
    values_S = torch.arange(12, 21) / 10
    expected_S = [0.0508, 0.4381, 0.8254, 1.2127, 1.6, 1.9873, 2.3746, 2.7619, 3.1492]
    assert whiten(values_S, shift_mean=False).tolist() == pytest.approx(expected_S, abs=5e-5)
    assert whiten(values_S).tolist() == pytest.approx([value - 1.6 for value in expected_S], abs=5e-5)


# Kills: division by the variance; standard deviation without the root.
@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.lists(st.integers(-50, 50), min_size=2, max_size=20).filter(lambda xs: len(set(xs)) > 1))
def test_whitened_values_have_mean_0_and_biased_variance_1(values: list[int]) -> None:
    values_S = torch.tensor(values, dtype=torch.float64)
    white_S = whiten(values_S)
    assert white_S.mean().item() == pytest.approx(0.0, abs=1e-9)
    assert white_S.var(unbiased=False).item() == pytest.approx(1.0, rel=1e-6)
    scaled_S = whiten(values_S, shift_mean=False)
    assert scaled_S.mean().item() == pytest.approx(values_S.mean().item(), abs=1e-9)
    assert_close(whiten(3 * values_S + 7), white_S, rtol=1e-6, atol=1e-6)


# Kills: the given mean ignored; the given variance ignored.
def test_moments_over_all_ranks_give_what_one_rank_would() -> None:
    values_S = torch.tensor([1.0, 4.0, 2.0, 9.0, 3.0], dtype=torch.float64)
    mean, variance = values_S.mean(), values_S.var(unbiased=False)
    for shift_mean in (True, False):
        parts = [whiten(part, mean, variance, shift_mean) for part in (values_S[:2], values_S[2:])]
        assert_close(torch.cat(parts), whiten(values_S, shift_mean=shift_mean))


# Kills: epsilon dropped.
def test_equal_values_whiten_to_0_and_not_to_nan() -> None:
    assert whiten(torch.full((4,), 2.0)).tolist() == [0.0] * 4
    assert whiten(torch.full((4,), 2.0), shift_mean=False).tolist() == [2.0] * 4
