"""The DPO family.

A mutant that a test was seen to kill is named above it.
"""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from lit_align.functional.dpo import (
    DPO_LOSSES,
    REFERENCE_FREE,
    PairLogps,
    dpo_loss,
    dpo_norm_loss,
    implicit_rewards,
    ipo_loss,
    simpo_loss,
)


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# Log-ratios 1 of 4 tokens and -2 of 8 tokens: h = 3, per token 1/4 + 2/8 = 1/2; mean logps -10/4 and -16/8.
PAIR = PairLogps(double(-10.0), double(-16.0), double(-11.0), double(-14.0), double(4.0), double(8.0))


def many(n: int = 6) -> PairLogps:
    generator = torch.Generator().manual_seed(0)
    logps = -10 * torch.rand(4, n, generator=generator, dtype=torch.float64)
    tokens = torch.randint(1, 9, (2, n), generator=generator).double()
    return PairLogps(*logps, *tokens)


def at_reference(pairs: PairLogps) -> PairLogps:
    """The policy is the reference, and takes gradients."""
    return pairs._replace(
        better_P=pairs.reference_better_P.clone().requires_grad_(),
        worse_P=pairs.reference_worse_P.clone().requires_grad_(),
    )


# Kills: beta dropped; sign of the margin; log-ratio of the worse added; reference swapped or dropped.
def test_dpo_by_hand() -> None:
    # -log sigmoid(0.1 * 3) = log(1 + e^-0.3).
    assert_close(dpo_loss(PAIR, beta=0.1), double(math.log1p(math.exp(-0.3))))
    assert_close(PAIR.log_ratio_better_P, double(1.0))
    assert_close(PAIR.log_ratio_worse_P, double(-2.0))


# Kills: smoothing weights flipped; second term with the same sign; smoothing ignored.
def test_dpo_with_label_smoothing_by_hand() -> None:
    expected = 0.8 * math.log1p(math.exp(-0.3)) + 0.2 * math.log1p(math.exp(0.3))
    assert_close(dpo_loss(PAIR, beta=0.1, label_smoothing=0.2), double(expected))


# Kills: sums for means; one length for both sides; 1 / beta for 1 / (2 beta); square dropped; abs for square.
def test_ipo_by_hand() -> None:
    # Gap per token 1/2, target 1 / (2 * 0.25) = 2.
    assert_close(ipo_loss(PAIR, beta=0.25), double(2.25))


# Kills: sums for means.
def test_dpo_norm_by_hand() -> None:
    assert_close(dpo_norm_loss(PAIR, beta=5.0), double(math.log1p(math.exp(-2.5))))
    expected = 0.9 * math.log1p(math.exp(-2.5)) + 0.1 * math.log1p(math.exp(2.5))
    assert_close(dpo_norm_loss(PAIR, beta=5.0, label_smoothing=0.1), double(expected))


# Kills: gamma added; gamma multiplied by beta; sums for means; log-ratios for logps.
def test_simpo_by_hand() -> None:
    # Mean logps -2.5 and -2: gap -0.5, margin 2 * -0.5 - 1 = -2.
    assert_close(simpo_loss(PAIR, beta=2.0, gamma=1.0), double(math.log1p(math.exp(2.0))))
    expected = 0.9 * math.log1p(math.exp(2.0)) + 0.1 * math.log1p(math.exp(-2.0))
    assert_close(simpo_loss(PAIR, beta=2.0, gamma=1.0, label_smoothing=0.1), double(expected))


def test_dpo_at_the_reference_is_log_2_with_slope_half_beta() -> None:
    pairs = at_reference(many())
    loss_P = dpo_loss(pairs, beta=0.3)
    assert_close(loss_P, torch.full_like(loss_P, math.log(2.0)))
    better_P, worse_P = torch.autograd.grad(loss_P.sum(), (pairs.better_P, pairs.worse_P))
    assert_close(better_P, torch.full_like(better_P, -0.15))
    assert_close(worse_P, torch.full_like(worse_P, 0.15))


def test_dpo_norm_at_the_reference_is_log_2_with_slope_half_beta_per_token() -> None:
    pairs = at_reference(many())
    loss_P = dpo_norm_loss(pairs, beta=5.0)
    assert_close(loss_P, torch.full_like(loss_P, math.log(2.0)))
    better_P, worse_P = torch.autograd.grad(loss_P.sum(), (pairs.better_P, pairs.worse_P))
    assert_close(better_P, -2.5 / pairs.better_tokens_P)
    assert_close(worse_P, 2.5 / pairs.worse_tokens_P)


def test_dpo_gradient_weighs_a_pair_by_how_wrong_it_is() -> None:
    # Rafailov et al. 2023, section 4: -beta sigmoid(reward of worse - reward of better).
    pairs = many()
    better_P = pairs.better_P.clone().requires_grad_()
    pairs = pairs._replace(better_P=better_P)
    (gradient_P,) = torch.autograd.grad(dpo_loss(pairs, beta=0.7).sum(), better_P)
    better_reward_P, worse_reward_P = implicit_rewards(pairs, beta=0.7)
    assert_close(gradient_P, -0.7 * (worse_reward_P - better_reward_P).sigmoid())


@pytest.mark.parametrize("loss", [dpo_loss, dpo_norm_loss])
def test_smoothed_loss_is_least_where_the_policy_believes_the_noise(loss: Callable[..., Tensor]) -> None:
    # sigmoid(beta h) = 1 - 0.1 at beta h = log 9, of one token.
    better_P = double(math.log(9.0) / 0.5).requires_grad_()
    zero, one = double(0.0), double(1.0)
    loss_P = loss(PairLogps(better_P, zero, zero, zero, one, one), beta=0.5, label_smoothing=0.1)
    (gradient_P,) = torch.autograd.grad(loss_P.sum(), better_P)
    assert gradient_P.abs().item() < 1e-12


def test_ipo_is_least_at_a_gap_per_token_of_half_inverse_beta() -> None:
    # 10 tokens, mean log-ratio 1 / (2 * 0.1) = 5.
    better_P = double(50.0).requires_grad_()
    pairs = PairLogps(better_P, double(0.0), double(0.0), double(0.0), double(10.0), double(3.0))
    loss_P = ipo_loss(pairs, beta=0.1)
    (gradient_P,) = torch.autograd.grad(loss_P.sum(), better_P)
    assert (loss_P.item(), gradient_P.item()) == (0.0, 0.0)
    assert ipo_loss(pairs._replace(better_P=double(51.0)), beta=0.1) > 0
    assert ipo_loss(pairs._replace(better_P=double(49.0)), beta=0.1) > 0


# Kills: label smoothing silently ignored.
def test_ipo_refuses_label_smoothing() -> None:
    with pytest.raises(ValueError, match="ipo loss has no label smoothing"):
        ipo_loss(PAIR, label_smoothing=0.1)


def test_normalised_loss_of_one_token_answers_is_dpo_and_longer_copies_do_not_change_it() -> None:
    pairs = many()
    ones_P = torch.ones_like(pairs.better_P)
    single = pairs._replace(better_tokens_P=ones_P, worse_tokens_P=ones_P)
    assert_close(dpo_norm_loss(single, beta=0.1), dpo_loss(single, beta=0.1))
    # Each token said three times: three times the log-probability, three times the tokens.
    tripled = PairLogps(*(3 * x for x in pairs))
    for loss in (dpo_norm_loss, ipo_loss, simpo_loss):
        assert_close(loss(tripled), loss(pairs))


def test_dpo_sees_only_the_difference_of_log_ratios() -> None:
    pairs = many()
    shifted = pairs._replace(better_P=pairs.better_P + 4.0, reference_worse_P=pairs.reference_worse_P - 4.0)
    assert_close(dpo_loss(shifted), dpo_loss(pairs))


def test_simpo_at_its_target_margin_is_log_2() -> None:
    # Mean logps 0.25 apart: 4 * 0.25 - 1 = 0.
    pairs = PAIR._replace(better_P=double(-7.0))  # -7 / 4 + 2 = 0.25
    assert_close(simpo_loss(pairs, beta=4.0, gamma=1.0), double(math.log(2.0)))


# Kills: REFERENCE_FREE too large; a loss without reference that takes it after all.
def test_reference_free_names_the_losses_that_never_look_at_the_reference() -> None:
    pairs = many()
    other = pairs._replace(
        reference_better_P=pairs.reference_better_P - 3, reference_worse_P=pairs.reference_worse_P * 2
    )
    assert {name for name, loss in DPO_LOSSES.items() if torch.equal(loss(pairs), loss(other))} == REFERENCE_FREE


# Kills: a wrong entry of DPO_LOSSES.
def test_losses_by_name() -> None:
    assert {"sigmoid": dpo_loss, "ipo": ipo_loss, "sigmoid_norm": dpo_norm_loss, "simpo": simpo_loss} == DPO_LOSSES


@pytest.mark.parametrize("name", DPO_LOSSES)
def test_each_pair_has_its_own_loss(name: str) -> None:
    pairs = many()
    loss_P = DPO_LOSSES[name](pairs, beta=0.4)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    assert loss_P.shape == (6,)
    assert_close(DPO_LOSSES[name](PairLogps(*(x[order] for x in pairs)), beta=0.4), loss_P[order])


# Kills: beta dropped; detach dropped; better and worse swapped.
def test_implicit_rewards_by_hand_and_without_gradient() -> None:
    policy_P = double(-10.0).requires_grad_()
    better_P, worse_P = implicit_rewards(PAIR._replace(better_P=policy_P, worse_P=policy_P - 6.0), beta=0.1)
    assert_close(better_P, double(0.1))
    assert_close(worse_P, double(-0.2))
    assert not better_P.requires_grad
    assert not worse_P.requires_grad
