"""The supervised loss.

A mutant that a test was seen to kill is named above it.
"""

import math

import pytest
import torch

from lit_align.functional.sft import dft_loss, neftune_noise, sft_loss


# Kills: mean for sum; sign; detach; count + 1.
def test_sum_and_count_by_hand() -> None:
    logps_S = torch.tensor([-1.0, -2.5, -0.5], requires_grad=True)
    total, count = sft_loss(logps_S)
    assert (total.item(), count) == (4.0, 3)
    total.backward()
    assert logps_S.grad is not None
    assert logps_S.grad.tolist() == [-1.0, -1.0, -1.0]


# Kills: mean for sum (a mean of means weighs the token of the short micro-batch three times).
def test_micro_batches_add_up_to_the_batch() -> None:
    logps_S = torch.tensor([-4.0, -1.0, -1.0, -1.0], dtype=torch.float64)
    whole, count = sft_loss(logps_S)
    parts = [sft_loss(part) for part in (logps_S[:1], logps_S[1:])]
    assert whole == sum(total for total, _ in parts)
    assert count == sum(tokens for _, tokens in parts)
    assert whole / count == 1.75


def test_no_scored_token_is_a_zero_with_a_gradient() -> None:
    logps_S = torch.zeros(0, requires_grad=True)
    total, count = sft_loss(logps_S)
    assert (total.item(), count) == (0.0, 0)
    total.backward()


# Kills: no weight; a weight with gradient (p log p has another derivative); the weight's sign.
def test_dft_weighs_by_a_probability_without_gradient() -> None:
    logps_S = torch.tensor([0.5, 0.1, 0.9], dtype=torch.float64).log().requires_grad_()
    total, count = dft_loss(logps_S)
    assert count == 3
    assert total.item() == pytest.approx(-sum(p * math.log(p) for p in (0.5, 0.1, 0.9)), abs=1e-12)
    total.backward()
    assert logps_S.grad is not None
    assert logps_S.grad.tolist() == pytest.approx([-0.5, -0.1, -0.9], abs=1e-12)


# Kills: sqrt of one of the two; a range from 0; a normal distribution.
def test_neftune_noise_is_uniform_in_a_range_that_length_and_width_narrow() -> None:
    noise_LH = neftune_noise(torch.empty(400, 64), 5.0, torch.Generator().manual_seed(0))
    edge = 5.0 / math.sqrt(400 * 64)
    assert noise_LH.shape == (400, 64)
    assert noise_LH.abs().max() <= edge
    assert noise_LH.min() < -0.99 * edge
    assert noise_LH.max() > 0.99 * edge
    assert noise_LH.mean().abs() < 0.01 * edge
    assert noise_LH.var() == pytest.approx(edge**2 / 3, rel=0.02)
    again = neftune_noise(torch.empty(400, 64), 5.0, torch.Generator().manual_seed(0))
    assert torch.equal(noise_LH, again)
