"""The clipped losses and the gauges of PPO.

A mutant that a test was seen to kill is named above it.
"""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from lit_align.functional.ppo import (
    aggregation_weights,
    clip_fraction,
    explained_variance,
    off_policy_drift,
    ppo_policy_loss,
    ppo_value_loss,
)


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# Kills: sign; ratio inverted (old - new).
def test_policy_loss_at_ratio_1_is_minus_the_advantage_and_so_is_its_gradient() -> None:
    logps_S = double(-1.0, -2.0, -3.0).requires_grad_()
    advantages_S = double(2.0, -0.5, 0.0)
    loss_S = ppo_policy_loss(logps_S, logps_S.detach(), advantages_S)
    assert_close(loss_S, -advantages_S)
    assert_close(torch.autograd.grad(loss_S.sum(), logps_S)[0], -advantages_S)


# Kills: minimum for maximum; always clipped; clip of the upper or the lower side only; clip dropped; clip fixed at 0.2.
@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope"),
    [
        (1.5, 2.0, -2.6, 0.0),  # good and already likelier: -2 * 1.3, no more push
        (0.5, -2.0, 1.4, 0.0),  # bad and already rarer: 2 * 0.7, no more push
        (1.5, -2.0, 3.0, 3.0),  # bad and likelier: the whole 2 * 1.5 pulls it back
        (0.5, 2.0, -1.0, -1.0),  # good and rarer: the whole -2 * 0.5
        (1.2, 2.0, -2.4, -2.4),  # inside the clip on either side: -A * ratio
        (0.8, -2.0, 1.6, 1.6),
    ],
)
def test_policy_loss_beyond_the_clip(ratio: float, advantage: float, loss: float, slope: float) -> None:
    logps_S = double(math.log(ratio) - 3.0).requires_grad_()
    loss_S = ppo_policy_loss(logps_S, double(-3.0), double(advantage), clip=0.3)
    assert_close(loss_S, double(loss))
    # d ratio / d logp = ratio; beyond the clip exactly 0.
    (gradient_S,) = torch.autograd.grad(loss_S.sum(), logps_S)
    assert gradient_S.item() == (pytest.approx(slope) if slope else 0.0)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.floats(-2, 2), st.floats(-3, 3), st.floats(0.05, 0.9))
def test_policy_loss_is_never_below_the_unclipped_one(log_ratio: float, advantage: float, clip: float) -> None:
    clipped_S = ppo_policy_loss(double(log_ratio), double(0.0), double(advantage), clip)
    assert clipped_S.item() >= -advantage * math.exp(log_ratio) - 1e-12


# Kills: clip_high ignored; clip_high for both sides.
@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope"),
    [
        (1.4, 2.0, -2.8, -2.8),  # beyond the lower epsilon and within the upper one: still pushed
        (1.7, 2.0, -3.0, 0.0),  # -2 * 1.5
        (0.7, -2.0, 1.6, 0.0),  # the lower side stays: 2 * 0.8
    ],
)
def test_policy_loss_with_a_higher_upper_clip(ratio: float, advantage: float, loss: float, slope: float) -> None:
    logps_S = double(math.log(ratio)).requires_grad_()
    loss_S = ppo_policy_loss(logps_S, double(0.0), double(advantage), clip=0.2, clip_high=0.5)
    assert_close(loss_S, double(loss))
    (gradient_S,) = torch.autograd.grad(loss_S.sum(), logps_S)
    assert gradient_S.item() == (pytest.approx(slope) if slope else 0.0)


# Kills: dual clip of positive advantages too; maximum for minimum; sign of c A.
@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope"),
    [
        (5.0, -2.0, 6.0, 0.0),  # bad and far likelier: 2 * 3 and not 2 * 5, and no more pull
        (2.0, -2.0, 4.0, 4.0),  # not as far: as without it
        (0.5, -2.0, 1.6, 0.0),
        (5.0, 2.0, -2.4, 0.0),  # good: as without it
        (0.5, 2.0, -1.0, -1.0),
    ],
)
def test_policy_loss_with_a_dual_clip(ratio: float, advantage: float, loss: float, slope: float) -> None:
    logps_S = double(math.log(ratio)).requires_grad_()
    loss_S = ppo_policy_loss(logps_S, double(0.0), double(advantage), clip=0.2, dual_clip=3.0)
    assert_close(loss_S, double(loss))
    (gradient_S,) = torch.autograd.grad(loss_S.sum(), logps_S)
    assert gradient_S.item() == (pytest.approx(slope) if slope else 0.0)


# Kills: count of sequences for token, of tokens for sequence; length of the batch's longest for the constant.
def test_aggregation_by_hand() -> None:
    losses_S = double(1.0, 2.0, 3.0, 10.0)  # a sequence of three tokens of mean 2, and one of one token
    sequence_S = torch.tensor([0, 0, 0, 1])

    def loss(*options: Any) -> float:
        weights_S, count = aggregation_weights(sequence_S, 2, *options)
        return ((weights_S.double() * losses_S).sum() / count).item()

    assert loss() == loss("token") == 16 / 4
    assert loss("sequence") == pytest.approx((2 + 10) / 2)
    assert loss("constant", 8) == pytest.approx((6 / 8 + 10 / 8) / 2)


def test_aggregations_agree_where_answers_are_equally_long() -> None:
    sequence_S = torch.arange(3).repeat_interleave(4)
    for aggregation, length in (("token", 1), ("sequence", 1), ("constant", 4)):
        weights_S, count = aggregation_weights(sequence_S, 3, aggregation, length)
        assert torch.equal(weights_S / count, torch.full((12,), 1 / 12))


def test_unknown_aggregation_is_an_error() -> None:
    with pytest.raises(ValueError, match="prompt"):
        aggregation_weights(torch.zeros(1, dtype=torch.long), 1, "prompt")  # type: ignore[arg-type]


# Kills: factor 1/2; sign of the change; clip around the return instead of the old value; minimum for maximum.
@pytest.mark.parametrize(
    ("value", "old", "target", "loss", "slope"),
    [
        (1.0, 1.0, 3.0, 2.0, -2.0),  # not moved: 1/2 * 2^2
        (1.1, 1.0, 3.0, 0.5 * 1.9**2, -1.9),  # moved less than the clip
        (2.0, 1.0, 3.0, 0.5 * 1.8**2, 0.0),  # moved too far towards the target: (1.2 - 3)^2, no more push
        (0.0, 1.0, 3.0, 0.5 * 3.0**2, -3.0),  # moved away from it: the whole error
        (0.0, 1.0, -3.0, 0.5 * 3.8**2, 0.0),  # downwards too: (0.8 + 3)^2
        (4.0, 1.0, 3.0, 0.5 * 1.8**2, 0.0),  # past the target: still the clipped error is larger
        (9.0, 1.0, 3.0, 0.5 * 6.0**2, 6.0),  # far past it
    ],
)
def test_value_loss_by_hand(value: float, old: float, target: float, loss: float, slope: float) -> None:
    values_S = double(value).requires_grad_()
    loss_S = ppo_value_loss(values_S, double(old), double(target), clip=0.2)
    assert_close(loss_S, double(loss))
    (gradient_S,) = torch.autograd.grad(loss_S.sum(), values_S)
    assert gradient_S.item() == (pytest.approx(slope) if slope else 0.0)


# Kills: None taken for a clip of 0.
def test_value_loss_without_a_clip_is_half_the_squared_error() -> None:
    values_S = double(0.0, 2.0, 5.0)
    loss_S = ppo_value_loss(values_S, double(100.0, 0.0, 0.0), double(1.0, 2.0, 1.0), clip=None)
    assert loss_S.tolist() == [0.5, 0.0, 8.0]


# Kills: one side only; mean of the excess.
def test_clip_fraction_counts_both_sides() -> None:
    ratio_S = double(1.0, 1.15, 1.25, 0.85, 0.75, 0.1, 3.0, 1.0)
    assert clip_fraction(ratio_S.log(), torch.zeros_like(ratio_S), clip=0.2) == 0.5
    assert clip_fraction(ratio_S.log() - 2.0, torch.full_like(ratio_S, -2.0), clip=0.5) == 0.25
    assert clip_fraction(ratio_S, ratio_S) == 0.0
    # 1.25 is within an upper epsilon of 0.3; the lower side stays.
    assert clip_fraction(ratio_S.log(), torch.zeros_like(ratio_S), clip=0.2, clip_high=0.3) == 0.375


# Kills: variance of the value for that of the residual; mean squared error for variance; 1 - dropped.
def test_explained_variance_by_hand() -> None:
    returns_S = double(1.0, 2.0, 3.0, 6.0)
    assert explained_variance(returns_S, returns_S) == 1.0
    assert explained_variance(returns_S + 5.0, returns_S) == 1.0  # a constant error explains all the variance
    assert explained_variance(torch.full_like(returns_S, 9.0), returns_S) == 0.0
    # Variance of the returns: mean 3, (4 + 1 + 0 + 9) / 4 = 3.5. Residuals 0, 1, 2, -1 of mean 0.5:
    # (0.25 + 0.25 + 2.25 + 2.25) / 4 = 1.25.
    assert_close(explained_variance(double(1.0, 1.0, 1.0, 7.0), returns_S), torch.tensor(1 - 1.25 / 3.5).double())
    # Twice the returns off, in the wrong direction: 1 - 4.
    assert_close(explained_variance(-returns_S, returns_S), torch.tensor(-3.0).double())


# Kills: variance > 0 for unequal (the fp32 variance of eight times 0.1 is 6e-17).
@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.floats(-100, 100, width=32), st.integers(1, 40))
def test_explained_variance_of_equal_returns_is_nan(value: float, count: int) -> None:
    values_S = torch.linspace(0.0, 1.0, count)
    assert explained_variance(values_S, torch.full((count,), value)).isnan()
    assert explained_variance(torch.full((8,), 0.2), torch.full((8,), 0.1)).isnan()


def test_clip_fraction_of_no_tokens_is_0() -> None:
    assert clip_fraction(torch.zeros(0), torch.zeros(0)) == 0.0


# Kills: the inverse ratio; a limit on one side; limits of log-probabilities.
def test_drift_is_training_over_sampling_and_counts_both_sides() -> None:
    sampled = double(0.5, 0.5, 0.5, 0.2).log()
    ratio, outside = off_policy_drift(double(0.5, 0.44, 0.54, 0.3).log(), sampled)
    assert_close(ratio, double(1.0, 0.88, 1.08, 1.5))
    assert outside.tolist() == [0.0, 1.0, 0.0, 1.0]
