"""Advantages without a value model, by hand and against the definitions.

A mutant that a test was seen to kill is named above it.
"""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from lit_align.functional.group import grpo, remax, returns_to_go, rloo


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# Kills: mean over all prompts; mean of all K; unbiased for biased standard deviation; scale dropped; K and E swapped.
def test_two_prompts_by_hand() -> None:
    rewards_Q = double(1.0, 2.0, 6.0, 5.0, 5.0, 5.0)
    # The others of 1, 2, 6 have means 4, 3.5, 1.5.
    assert_close(rloo(rewards_Q, 3), double(-3.0, -1.5, 4.5, 0.0, 0.0, 0.0))
    # Mean 3; squares 4 + 1 + 9 over K - 1 = 2.
    assert_close(grpo(rewards_Q, 3, scale=False), double(-2.0, -1.0, 3.0, 0.0, 0.0, 0.0))
    assert_close(grpo(rewards_Q, 3), double(-2.0, -1.0, 3.0, 0.0, 0.0, 0.0) / (7**0.5 + 1e-4))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(1, 4), st.integers(2, 6), st.integers(0, 1000))
def test_leave_one_out_is_k_over_k_minus_1_times_the_distance_from_the_mean(prompts: int, k: int, seed: int) -> None:
    rewards_Q = torch.randn(prompts * k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    mean_Q = rewards_Q.view(prompts, k).mean(1).repeat_interleave(k)
    assert_close(rloo(rewards_Q, k), k / (k - 1) * (rewards_Q - mean_Q))
    others = [rewards_Q.view(prompts, k)[q // k].sum() - rewards_Q[q] for q in range(prompts * k)]
    assert_close(rloo(rewards_Q, k), rewards_Q - torch.stack(others) / (k - 1))


@pytest.mark.parametrize("advantage", [rloo, grpo])
def test_a_shift_of_the_rewards_of_a_prompt_changes_nothing(advantage: Callable) -> None:
    rewards_Q = double(1.0, 2.0, 6.0, 0.5, -1.0, 4.0)
    shift_Q = double(3.0, 3.0, 3.0, -7.0, -7.0, -7.0)
    assert_close(advantage(rewards_Q + shift_Q, 3), advantage(rewards_Q, 3))
    assert_close(advantage(rewards_Q, 3).view(2, 3).sum(1), double(0.0, 0.0))


@pytest.mark.parametrize("advantage", [rloo, grpo])
def test_wrong_groups_are_errors(advantage: Callable) -> None:
    with pytest.raises(ValueError, match="at least 2 of them, got 1"):
        advantage(torch.zeros(4), 1)
    with pytest.raises(ValueError, match="5 rewards are no multiple of 2"):
        advantage(torch.zeros(5), 2)


# Kills: return of the whole answer for each token; discount dropped; forward sum; baseline at the last token only.
def test_returns_to_go_and_remax_by_hand() -> None:
    rewards_S, sequence_S = double(1.0, 0.0, 2.0, 3.0), torch.tensor([0, 0, 0, 1])
    assert_close(returns_to_go(rewards_S, sequence_S, 2), double(3.0, 2.0, 2.0, 3.0))
    assert_close(returns_to_go(rewards_S, sequence_S, 2, discount=0.5), double(1.5, 1.0, 2.0, 3.0))
    assert_close(remax(rewards_S, double(1.0, -2.0), sequence_S, 2), double(2.0, 1.0, 1.0, 5.0))


def expected_gradient(advantage: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Of two answers drawn from three: mean over all draws of the policy gradient, and what it should be."""
    logits_V, rewards_V = double(0.3, -0.2, 0.6).requires_grad_(), double(1.0, -2.0, 0.5)
    logps_V = logits_V.log_softmax(-1)
    estimate = double(0.0)
    for i in range(3):
        for j in range(3):
            chosen = torch.tensor([i, j])
            weight = logps_V[chosen].sum().exp().detach()
            estimate = estimate + weight * (advantage(rewards_V[chosen]) * logps_V[chosen]).mean()
    true = (logps_V.exp() * rewards_V).sum()
    return tuple(torch.autograd.grad(value, logits_V, retain_graph=True)[0] for value in (estimate, true))  # type: ignore


# Kills: leave-one-out without K / (K - 1); greedy score added.
def test_leave_one_out_and_the_greedy_baseline_are_unbiased_and_the_mean_of_all_is_half_of_it() -> None:
    sequence_S = torch.arange(2)
    estimate_V, true_V = expected_gradient(lambda rewards_Q: rloo(rewards_Q, 2))
    assert_close(estimate_V, true_V)
    assert_close(expected_gradient(lambda r: remax(r, double(0.5, 0.5), sequence_S, 2))[0], true_V)
    assert_close(expected_gradient(lambda rewards_Q: grpo(rewards_Q, 2, scale=False))[0], true_V / 2)
