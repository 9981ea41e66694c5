"""KL divergence: exact, estimated, priced. A vocabulary of six is small enough to take every expectation exactly.

A mutant that a test was seen to kill is named above it.
"""

import math
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from lit_align.functional.kl import KLEstimator, adapt_kl_coefficient, best_of_n_kl, estimate_kl, exact_kl


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def two_distributions() -> tuple[Tensor, Tensor]:
    """Logits of p, with gradient, and log q. Shape (6,)."""
    logits_V, reference_V = torch.randn(2, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return logits_V.requires_grad_(), reference_V.log_softmax(-1)


# Kills: the two distributions swapped; sign; sum over tokens as well.
def test_exact_kl_by_hand() -> None:
    logps_SV = double(0.5, 0.5, 0.25, 0.75).view(2, 2).log()
    reference_SV = double(0.25, 0.75, 0.25, 0.75).view(2, 2).log()
    # 1/2 log 2 + 1/2 log(2/3) = 1/2 log(4/3); equal distributions: 0.
    assert_close(exact_kl(logps_SV, reference_SV), double(0.5 * math.log(4 / 3), 0.0))
    # The other way round: 1/4 log(1/2) + 3/4 log(3/2).
    assert_close(exact_kl(reference_SV, logps_SV)[0], double(0.25 * math.log(0.5) + 0.75 * math.log(1.5))[0])


# Kills: masked_fill dropped (NaN).
def test_exact_kl_with_tokens_of_no_mass() -> None:
    inf = math.inf
    p_SV = torch.stack([double(1.0, 0.0, 0.0).log(), double(0.5, 0.5, 0.0).log()]).requires_grad_()
    q_SV = torch.stack([double(0.5, 0.5, 0.0).log(), double(1.0, 0.0, 0.0).log()])
    kl_S = exact_kl(p_SV, q_SV)
    assert kl_S.tolist() == [pytest.approx(math.log(2.0)), inf]  # what q excludes costs p infinitely much
    (gradient_SV,) = torch.autograd.grad(kl_S[0], p_SV)
    assert gradient_SV[0].isfinite().all()


# Kills: sign of k1; factor 1/2 of k2; sign of the log in k3; p / q for q / p.
def test_estimators_by_hand() -> None:
    logps_S, reference_S = double(0.5, 0.2).log(), double(0.25, 0.6).log()  # r = 1/2 and 3
    log2, log3 = math.log(2.0), math.log(3.0)
    assert_close(estimate_kl(logps_S, reference_S), double(log2, -log3))
    assert_close(estimate_kl(logps_S, reference_S, "k1"), double(log2, -log3))
    assert_close(estimate_kl(logps_S, reference_S, "k2"), double(0.5 * log2**2, 0.5 * log3**2))
    assert_close(estimate_kl(logps_S, reference_S, "k3"), double(0.5 - 1 + log2, 3.0 - 1 - log3))
    assert torch.equal(estimate_kl(logps_S, reference_S, "k3+"), estimate_kl(logps_S, reference_S, "k3"))


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_k1_and_k3_are_unbiased(estimator: KLEstimator) -> None:
    logits_V, reference_V = two_distributions()
    logps_V = logits_V.log_softmax(-1)
    mean = (logps_V.exp() * estimate_kl(logps_V, reference_V, estimator)).sum()
    assert_close(mean, exact_kl(logps_V, reference_V))


def test_k2_is_biased_but_agrees_to_second_order() -> None:
    logits_V, reference_V = two_distributions()
    logps_V = logits_V.detach().log_softmax(-1)
    far = (logps_V.exp() * estimate_kl(logps_V, reference_V, "k2")).sum() / exact_kl(logps_V, reference_V)
    near_V = (reference_V + 0.01 * logits_V.detach()).log_softmax(-1)
    near = (near_V.exp() * estimate_kl(near_V, reference_V, "k2")).sum() / exact_kl(near_V, reference_V)
    assert abs(far - 1) > 0.03
    assert abs(near - 1) < 0.003


# Kills: factor 1/2 of k2; p / q for q / p in k3; k3 not detached in k3+; the value of k3+ from k2.
def test_expected_gradient_as_a_loss() -> None:
    logits_V, reference_V = two_distributions()
    logps_V = logits_V.log_softmax(-1)
    probs_V = logps_V.exp().detach()  # the sampling does not take a gradient

    def gradient(loss: Tensor) -> Tensor:
        return torch.autograd.grad(loss, logits_V, retain_graph=True)[0]

    def expected(estimator: KLEstimator) -> Tensor:
        return gradient((probs_V * estimate_kl(logps_V, reference_V, estimator)).sum())

    forward_V, reverse_V = gradient(exact_kl(logps_V, reference_V)), gradient(exact_kl(reference_V, logps_V))
    assert (forward_V - reverse_V).abs().max() > 0.01
    assert_close(expected("k1"), torch.zeros_like(logits_V))
    assert_close(expected("k2"), forward_V)
    assert_close(expected("k3"), reverse_V)
    assert_close(expected("k3+"), forward_V)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.floats(-30, 0), st.floats(-30, 0))
def test_k2_and_k3_are_never_negative_and_all_are_0_at_equality(logp: float, reference: float) -> None:
    logps_S, reference_S = double(logp), double(reference)
    assert estimate_kl(logps_S, reference_S, "k2").item() >= 0
    assert estimate_kl(logps_S, reference_S, "k3").item() >= 0
    for estimator in get_args(KLEstimator):
        assert estimate_kl(logps_S, logps_S, estimator).item() == 0.0


# Kills: exp(x) - 1 for expm1.
def test_k3_keeps_its_digits_near_0() -> None:
    # x^2 / 2 = 5e-9 at x = 1e-4, far below the 1.2e-7 between fp32 numbers at 1: exp(x) - 1 - x keeps no digit of it.
    assert estimate_kl(torch.zeros(1), torch.tensor([1e-4]), "k3").item() == pytest.approx(5e-9, rel=0.01)


# Kills: fall through to k3 for an unknown name.
def test_unknown_estimator_is_an_error() -> None:
    with pytest.raises(ValueError, match="k4"):
        estimate_kl(torch.zeros(1), torch.zeros(1), "k4")  # type: ignore[arg-type]


# Kills: clip of one side; clip dropped; sign; episodes and horizon swapped; error not relative to the target.
@pytest.mark.parametrize(
    ("kl", "coefficient"),
    [
        (6.0, 0.15),  # on target
        (6.6, 0.150768),  # 10 % above: 0.15 * (1 + 0.1 * 0.0512)
        (12.0, 0.151536),  # 100 % above, clipped to 20 %: 0.15 * (1 + 0.2 * 0.0512)
        (5.4, 0.149232),  # 10 % below: 0.15 * (1 - 0.1 * 0.0512)
        (0.0, 0.148464),  # 100 % below, clipped
        (-3.0, 0.148464),  # an estimate may be negative
    ],
)
def test_adaptive_coefficient_by_hand(kl: float, coefficient: float) -> None:
    # Huang et al. 2024, detail 20: start 0.15, target 6, horizon 10,000; batches of 512.
    assert adapt_kl_coefficient(0.15, kl, 6.0, 10_000, 512) == pytest.approx(coefficient, rel=1e-12)


def test_adaptive_coefficient_finds_the_price_of_the_target() -> None:
    coefficient = 5.0
    for _ in range(400):
        coefficient = adapt_kl_coefficient(
            coefficient, 3.0 / coefficient, 6.0, 100, 64
        )  # a policy whose KL is 3 / price
    assert coefficient == pytest.approx(0.5, rel=1e-3)


# Kills: log n alone; (n - 1) / n added; 1 / n for (n - 1) / n.
@pytest.mark.parametrize("n", [1, 2, 4, 64])
def test_best_of_n_against_its_exact_distribution(n: int) -> None:
    """Of answers in the order of their reward, one is best of n with probability F^n - F_before^n."""

    def exact(p_V: Tensor) -> float:
        up_to_V = p_V.cumsum(0)
        best_V = up_to_V**n - (up_to_V - p_V).clamp(min=0) ** n
        return exact_kl(best_V.log()[None], p_V.log()[None]).item()

    # Many answers, each unlikely: the formula is exact. Few: it is a bound.
    assert exact(torch.full((200_000,), 1 / 200_000, dtype=torch.float64)) == pytest.approx(best_of_n_kl(n), abs=1e-3)
    few_V = torch.randn(6, generator=torch.Generator().manual_seed(n), dtype=torch.float64).softmax(0)
    assert exact(few_V) <= best_of_n_kl(n) + 1e-12


def test_best_of_no_answers() -> None:
    with pytest.raises(ValueError, match="n of at least 1, got 0"):
        best_of_n_kl(0)
