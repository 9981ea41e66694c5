"""The DPO family.

A mutant that a test was seen to kill is named above it.
"""

import functools
import math
from collections.abc import Callable
from typing import get_args

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from lit_align.functional.dpo import (
    PairLogps,
    alpha_divergence_loss,
    dpo_loss,
    dpo_norm_loss,
    exo_loss,
    forward_kl_loss,
    implicit_rewards,
    ipo_loss,
    nll_loss,
    plackett_luce_dpo_loss,
    robust_loss,
    simpo_loss,
)
from lit_align.functional.dpo_losses import DPO_LOSSES, RANKING_LOSSES, REFERENCE_FREE, LossName, loss_options
from lit_align.functional.kto import kto_loss, ranked_kto_loss, verdicts


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


def test_normalised_loss_of_one_token_answers_is_dpo() -> None:
    pairs = many()
    ones_P = torch.ones_like(pairs.better_P)
    single = pairs._replace(better_tokens_P=ones_P, worse_tokens_P=ones_P)
    assert_close(dpo_norm_loss(single, beta=0.1), dpo_loss(single, beta=0.1))


# Kills: sums for means; the worse answer's; sign.
def test_likelihood_of_the_better_answer_is_a_mean_over_tokens() -> None:
    assert_close(nll_loss(PAIR), double(2.5))


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


# Each loss by hand, on log-ratios 1 and -2, h = 3; 4 and 8 tokens; options and value.
def nll(x: float) -> float:
    """-log sigmoid."""
    return math.log1p(math.exp(-x))


def sigmoid(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x))


def log_odds(logp: float) -> float:
    return logp - math.log(1.0 - math.exp(logp))


E = math.exp(1.0)
BY_HAND: dict[str, tuple[dict[str, float], float]] = {
    # Kills: flipped term added; divisor dropped; smoothing shares exchanged.
    "robust": ({"beta": 0.1, "label_smoothing": 0.2}, (0.8 * nll(0.3) - 0.2 * nll(-0.3)) / 0.6),
    # Kills: 1 + beta h; beta dropped.
    "hinge": ({"beta": 0.1}, 0.7),
    # Kills: sign of the penalty; penalty times beta; lengths exchanged.
    "r_dpo": ({"beta": 0.1, "length_penalty": 0.05}, nll(0.3 - 0.05 * 4)),
    # Kills: KL(p || q); the labels' probabilities exchanged; either term dropped.
    "exo_pair": (
        {"beta": 0.1, "label_smoothing": 0.2},
        sigmoid(0.3) * math.log(sigmoid(0.3) / 0.8) + sigmoid(-0.3) * math.log(sigmoid(-0.3) / 0.2),
    ),
    # Kills: the shares exchanged; tau dropped; exp(+m).
    "discopop": ({"beta": 0.1, "tau": 0.5}, sigmoid(-0.6) * nll(0.3) + sigmoid(0.6) * math.exp(-0.3)),
    # Kills: 1 / u without its sign; u for 1 / u.
    "forward_kl": ({"beta": 0.1}, nll(0.1 * (-1 / E + E**2))),
    # Kills: log(1 + u) for log(1 + 1 / u); sides exchanged.
    "js_divergence": ({"beta": 0.1}, nll(0.1 * (math.log(2 * E / (1 + E)) - math.log(2 * E**-2 / (1 + E**-2))))),
    # Kills: TRL's 1 - alpha; alpha dropped outside the exponent.
    "alpha_divergence": ({"beta": 0.1, "alpha": 0.25}, nll(0.1 / 0.25 * (E**0.5 - E**-0.25))),
    # Kills: 1/2 dropped; the better answer's second term dropped; a sign.
    "nca_pair": ({"beta": 0.1}, nll(0.1) + 0.5 * nll(-0.1) + 0.5 * nll(0.2)),
    # Kills: a sign.
    "bco_pair": ({"beta": 0.1}, nll(0.1) + nll(0.2)),
    # Kills: 1 / beta for 1 / (2 beta); a sign.
    "sppo_hard": ({"beta": 0.25}, (1.0 - 2.0) ** 2 + (-2.0 + 2.0) ** 2),
    # Kills: a sign; 1 - dropped.
    "apo_zero": ({"beta": 0.1}, 1 - sigmoid(0.1) + sigmoid(-0.2)),
    # Kills: h for the worse log-ratio; a sign.
    "apo_down": ({"beta": 0.1}, sigmoid(0.1) + 1 - sigmoid(0.3)),
    # Kills: log-ratios for logps; the likelihood dropped, summed, or that of the worse answer.
    "cpo": ({"beta": 0.1, "nll_coef": 0.5}, nll(0.1 * 6) + 0.5 * 10 / 4),
    # Kills: sums for means; log p for log-odds; beta on the likelihood.
    "orpo": ({"beta": 0.1}, 2.5 + 0.1 * nll(log_odds(-2.5) - log_odds(-2.0))),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_loss_by_hand(name: str) -> None:
    options, expected = BY_HAND[name]
    assert_close(DPO_LOSSES[name](PAIR, **options), double(expected))
    assert set(options) <= set(loss_options(name))


def test_every_loss_is_tried_by_hand() -> None:
    assert set(BY_HAND) | {"sigmoid", "ipo", "sigmoid_norm", "simpo"} == set(DPO_LOSSES)


# Kills: relu dropped.
def test_hinge_leaves_a_pair_alone_that_is_far_enough_apart() -> None:
    # h = 3 is beyond 1 / 0.5.
    better_P = double(-10.0).requires_grad_()
    loss_P = DPO_LOSSES["hinge"](PAIR._replace(better_P=better_P), beta=0.5)
    assert (loss_P.item(), torch.autograd.grad(loss_P.sum(), better_P)[0].item()) == (0.0, 0.0)


# Kills: label smoothing dropped.
@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, {}) for name in ("sigmoid", "sigmoid_norm", "r_dpo")),
        *((name, {}) for name in ("forward_kl", "js_divergence", "alpha_divergence")),
        ("cpo", {"nll_coef": 0.0}),
        ("simpo", {"gamma": 0.0}),
    ],
)
def test_smoothed_losses_mix_the_two_labels(name: str, options: dict[str, float]) -> None:
    # Exchanged answers are the other label.
    loss = functools.partial(DPO_LOSSES[name], beta=0.1, **options)
    flipped = PairLogps(*(PAIR[i] for i in (1, 0, 3, 2, 5, 4)))
    assert_close(loss(PAIR, label_smoothing=0.2), 0.8 * loss(PAIR) + 0.2 * loss(flipped))


# Slope of the loss in the log-probability of the better and of the worse answer where the policy is the reference, for
# beta = 0.4 and answers of 2 and of 5 tokens. It says which way training sets off.
SLOPES: dict[str, tuple[dict[str, float], tuple[float, float]]] = {
    "sigmoid": ({}, (-0.2, 0.2)),
    "robust": ({"label_smoothing": 0.1}, (-0.25, 0.25)),
    "hinge": ({}, (-0.4, 0.4)),
    "ipo": ({}, (-2.5 / 2, 2.5 / 5)),
    "sigmoid_norm": ({}, (-0.2 / 2, 0.2 / 5)),
    "r_dpo": ({"length_penalty": 0.0}, (-0.2, 0.2)),
    "exo_pair": ({"label_smoothing": 0.2}, (-0.1 * math.log(4), 0.1 * math.log(4))),
    # w' (1 - log 2) - 3/4 with w' = 1 / (4 tau) = 5: upwards, the wrong way, at the paper's tau.
    "discopop": ({"tau": 0.05}, (0.4 * (5 * (1 - math.log(2)) - 0.75), -0.4 * (5 * (1 - math.log(2)) - 0.75))),
    # Near the reference a divergence is its f''(1), here 1, 1/2 and 1.
    "forward_kl": ({}, (-0.2, 0.2)),
    "js_divergence": ({}, (-0.1, 0.1)),
    "alpha_divergence": ({"alpha": 0.3}, (-0.2, 0.2)),
    "nca_pair": ({}, (-0.1, 0.1)),
    "bco_pair": ({}, (-0.2, 0.2)),
    "sppo_hard": ({}, (-2.5, 2.5)),
    "apo_zero": ({}, (-0.1, 0.1)),
    # The better answer is held where it is at first, and falls once the worse one has fallen.
    "apo_down": ({}, (0.0, 0.1)),
}


@pytest.mark.parametrize("name", SLOPES)
def test_slope_at_the_reference(name: str) -> None:
    options, expected = SLOPES[name]
    pairs = at_reference(many()._replace(better_tokens_P=torch.full((6,), 2.0), worse_tokens_P=torch.full((6,), 5.0)))
    loss_P = DPO_LOSSES[name](pairs, beta=0.4, **options)
    slopes = torch.autograd.grad(loss_P.sum(), (pairs.better_P, pairs.worse_P))
    assert_close(slopes, tuple(torch.full_like(pairs.better_P, slope) for slope in expected))


def test_every_loss_with_a_reference_has_its_slope_there() -> None:
    assert set(SLOPES) == set(DPO_LOSSES) - REFERENCE_FREE


@pytest.mark.parametrize("name", sorted(REFERENCE_FREE))
def test_reference_free_losses_raise_the_better_and_lower_the_worse_answer(name: str) -> None:
    pairs = many()
    policy = [pairs.better_P.requires_grad_(), pairs.worse_P.requires_grad_()]
    better_P, worse_P = torch.autograd.grad(DPO_LOSSES[name](pairs).sum(), policy)
    assert (better_P < 0).all()
    assert (worse_P > 0).all()


@pytest.mark.parametrize("name", DPO_LOSSES)
def test_gradient_is_the_finite_difference(name: str) -> None:
    pairs = many()
    policy = (pairs.better_P.requires_grad_(), pairs.worse_P.requires_grad_())

    def loss(better_P: Tensor, worse_P: Tensor) -> Tensor:
        return DPO_LOSSES[name](pairs._replace(better_P=better_P, worse_P=worse_P))

    assert torch.autograd.gradcheck(loss, policy, raise_exception=False)


def unchanged(change: Callable[[PairLogps], PairLogps]) -> set[str]:
    """Names of the losses that a change of the pairs leaves as they are."""
    pairs = many()
    names = set()
    for name, loss in DPO_LOSSES.items():
        if torch.allclose(loss(change(pairs)), loss(pairs), rtol=1e-9):
            names.add(name)
    return names


def test_which_losses_see_only_the_gap() -> None:
    # Both answers 3 nats up: losses of h do not notice, whatever becomes of the probability mass.
    assert unchanged(lambda p: p._replace(better_P=p.better_P + 3.0, worse_P=p.worse_P + 3.0)) == {
        "sigmoid", "robust", "hinge", "r_dpo", "exo_pair", "discopop",
    }  # fmt: skip
    # The same per token.
    assert unchanged(
        lambda p: p._replace(better_P=p.better_P + p.better_tokens_P, worse_P=p.worse_P + p.worse_tokens_P)
    ) == {"ipo", "sigmoid_norm", "simpo"}


def test_losses_see_the_policy_through_the_log_ratio_alone() -> None:
    def both(p: PairLogps) -> PairLogps:
        better_P, worse_P = p.better_P + 3.0, p.worse_P - 1.0
        return p._replace(
            better_P=better_P,
            worse_P=worse_P,
            reference_better_P=p.reference_better_P + 3.0,
            reference_worse_P=p.reference_worse_P - 1.0,
        )

    assert unchanged(both) == set(DPO_LOSSES) - REFERENCE_FREE


def test_which_losses_average_over_tokens() -> None:
    # Each token said three times: three times the log-probability, three times the tokens.
    assert unchanged(lambda p: PairLogps(*(3 * x for x in p))) == {"ipo", "sigmoid_norm", "simpo", "orpo"}


# Kills: the caps of the exponentials; the cap of the log-odds; discopop as a product; clamp(min=1) dropped.
@pytest.mark.parametrize("name", DPO_LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_far_from_the_reference_loss_and_gradient_stay_finite(name: str, dtype: torch.dtype) -> None:
    ends = torch.tensor([-2000.0, -300.0, -1e-9, 0.0], dtype=dtype)
    grid = [x.flatten() for x in torch.meshgrid(ends, ends, ends, ends, indexing="ij")]
    policy = [grid[0].requires_grad_(), grid[1].requires_grad_()]
    tokens = torch.tensor([0, 1, 7, 300]).repeat(len(grid[0]) // 4)
    loss_P = DPO_LOSSES[name](PairLogps(*policy, grid[2], grid[3], tokens, tokens.flip(0)))
    assert loss_P.isfinite().all()
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(loss_P.sum(), policy))


def test_robust_loss_on_noisy_labels_is_the_loss_on_true_ones() -> None:
    pairs = many()
    flipped = PairLogps(*(pairs[i] for i in (1, 0, 3, 2, 5, 4)))
    noisy_P = 0.7 * robust_loss(pairs, 0.5, 0.3) + 0.3 * robust_loss(flipped, 0.5, 0.3)
    assert_close(noisy_P, dpo_loss(pairs, 0.5))


def test_divergences_meet_in_the_middle() -> None:
    pairs = many()
    assert_close(alpha_divergence_loss(pairs, alpha=1e-9), dpo_loss(pairs), rtol=1e-6, atol=1e-6)
    assert_close(alpha_divergence_loss(pairs, alpha=1.0), forward_kl_loss(pairs))
    for alpha in (0.0, -0.5, 1.5):
        with pytest.raises(ValueError, match=r"alpha must be in \(0, 1\]"):
            alpha_divergence_loss(pairs, alpha=alpha)


def test_exo_is_zero_where_the_policy_agrees_with_the_smoothed_label() -> None:
    # sigmoid(beta h) = 0.9 at h = log 9 / beta.
    better_P = double(math.log(9.0) / 0.5).requires_grad_()
    zero = double(0.0)
    loss_P = exo_loss(PairLogps(better_P, zero, zero, zero, zero + 1, zero + 1), beta=0.5, label_smoothing=0.1)
    (gradient_P,) = torch.autograd.grad(loss_P.sum(), better_P)
    assert abs(loss_P.item()) < 1e-12
    assert abs(gradient_P.item()) < 1e-12


@pytest.mark.parametrize(
    ("loss", "smoothing"), [(dpo_loss, 0.5), (robust_loss, 0.5), (exo_loss, 0.0), (dpo_loss, -0.1)]
)
def test_label_smoothing_has_a_range(loss: Callable[..., Tensor], smoothing: float) -> None:
    with pytest.raises(ValueError, match="label_smoothing must be in"):
        loss(PAIR, label_smoothing=smoothing)


# Rankings.

RANKS = double(1.0, 0.0, 2.0, 0.0, 1.0)
EXAMPLES = torch.tensor([0, 0, 0, 1, 1])
RATIOS = double(0.5, -1.0, 2.0, 3.0, 1.0)


# Kills: beta dropped; rank and log-ratio of another answer.
def test_plackett_luce_dpo_by_hand_and_as_dpo_for_pairs() -> None:
    a, b, c = 0.05, -0.1, 0.2
    first = -math.log(math.exp(b) / (math.exp(a) + math.exp(b) + math.exp(c)))
    second = -math.log(math.exp(a) / (math.exp(a) + math.exp(c)))
    loss_E = plackett_luce_dpo_loss(RATIOS, RANKS, EXAMPLES, 2, beta=0.1)
    assert_close(loss_E, double(first + second, nll(0.2)))
    zero = double(0.0)
    assert_close(loss_E[1:], dpo_loss(PairLogps(double(3.0), double(1.0), zero, zero, zero, zero), beta=0.1))


# Kills: sign; differences of ranks for wins; comparison across prompts; a tie that counts; a lone answer as a tie.
def test_verdicts_by_hand() -> None:
    rank_Q = double(1.0, 0.0, 9.0, 0.0, 1.0, 5.0, 5.0, 0.0, 1.0, 0.0, 0.0, 1.0)
    example_Q = torch.tensor([0, 0, 0, 1, 1, 2, 2, 3, 4, 5, 5, 5])
    # Three answers; a pair; a tie; two lone answers; two that share the first rank.
    expected = [0.0, 1.0, -1.0, 1.0, -1.0, 0.0, 0.0, 1.0, -1.0, 1.0, 1.0, -1.0]
    assert verdicts(rank_Q, example_Q).tolist() == expected
    assert verdicts(rank_Q.long(), example_Q).tolist() == expected


# Kills: a sign; weights exchanged; reference point dropped or added; beta dropped; a neutral answer counted.
def test_kto_by_hand() -> None:
    log_ratio_Q = double(1.0, -2.0, 0.5, 7.0)
    verdict_Q = torch.tensor([1.0, -1.0, -1.0, 0.0])
    loss_Q = kto_loss(log_ratio_Q, verdict_Q, 0.25, beta=0.1, desirable_weight=1.1, undesirable_weight=0.9)
    expected = [1.1 * (1 - sigmoid(0.075)), 0.9 * (1 - sigmoid(0.225)), 0.9 * (1 - sigmoid(-0.025)), 0.0]
    assert_close(loss_Q, double(*expected))


# Kills: sum for mean; the neutral answer in the mean; clamp dropped; ranks or weights not passed on.
def test_kto_weighs_prompts_alike() -> None:
    rank_Q = torch.tensor([1.0, 0.0, 2.0, 0.0, 1.0, 3.0, 3.0])
    example_Q = torch.tensor([0, 0, 0, 1, 1, 2, 2])
    log_ratio_Q = double(9.0, 1.0, -2.0, 0.5, 0.0, 4.0, 5.0)
    loss_E = ranked_kto_loss(
        log_ratio_Q, rank_Q, example_Q, 3, 0.25, beta=0.1, desirable_weight=1.1, undesirable_weight=0.9
    )
    three = 0.5 * (1.1 * (1 - sigmoid(0.075)) + 0.9 * (1 - sigmoid(0.225)))
    two = 0.5 * (1.1 * (1 - sigmoid(0.025)) + 0.9 * (1 - sigmoid(0.025)))
    assert_close(loss_E, double(three, two, 0.0))


def test_kto_of_a_pair_at_reference_point_0_is_half_of_apo_zero() -> None:
    pairs = many()
    ratios = torch.stack([pairs.log_ratio_better_P, pairs.log_ratio_worse_P], 1).flatten()
    example_Q = torch.arange(6).repeat_interleave(2)
    loss_E = ranked_kto_loss(ratios, torch.tensor([0.0, 1.0]).repeat(6), example_Q, 6, 0.0, beta=0.3)
    assert_close(loss_E, 0.5 * DPO_LOSSES["apo_zero"](pairs, beta=0.3))


def test_kto_gradient_is_steepest_at_the_reference_point() -> None:
    log_ratio_Q = double(0.0, 1.0, 2.0, 3.0, 4.0).requires_grad_()
    loss_Q = kto_loss(log_ratio_Q, torch.ones(5), 2.0, beta=0.7)
    (gradient_Q,) = torch.autograd.grad(loss_Q.sum(), log_ratio_Q)
    assert gradient_Q.argmin() == 2
    assert_close(gradient_Q, gradient_Q.flip(0))
    assert_close(gradient_Q[2].item(), -0.7 / 4)


# Names and coefficients.


def test_names() -> None:
    assert set(get_args(LossName)) == set(DPO_LOSSES) | set(RANKING_LOSSES)


@pytest.mark.parametrize("name", [*DPO_LOSSES, *RANKING_LOSSES])
def test_every_loss_has_a_beta_and_defaults(name: str) -> None:
    options = loss_options(name)
    assert options["beta"] > 0
    assert all(isinstance(value, float) for value in options.values())
    assert loss_options(name, beta=0.7, label_smoothing=None) == {**options, "beta": 0.7}


# Kills: a coefficient silently ignored.
@pytest.mark.parametrize(("name", "option"), [("ipo", "label_smoothing"), ("sigmoid", "gamma"), ("kto", "tau")])
def test_a_coefficient_that_a_loss_lacks_is_refused(name: str, option: str) -> None:
    with pytest.raises(ValueError, match=f"the {name} loss has no {option}: it takes beta"):
        loss_options(name, **{option: 0.1})
    with pytest.raises(ValueError, match="unknown loss 'dop': choose one of sigmoid"):
        loss_options("dop")
