"""Log-probabilities, entropies and the shaped distribution.

A mutant that a test was seen to kill is named above it.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from lit_align.functional.logprobs import (
    add_at_ends,
    shape_logits,
    sum_by_sequence,
    token_entropies,
    token_logprobs,
    upcast,
)

INF = math.inf


def double(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


# Kills: upcast leaves float16 alone; upcast turns float64 into fp32.
@pytest.mark.parametrize(
    ("given_dtype", "expected"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_half_precision_leaves_in_fp32(given_dtype: torch.dtype, expected: torch.dtype) -> None:
    logits_SV = torch.randn(3, 5).to(given_dtype)
    assert upcast(logits_SV).dtype == expected
    assert token_logprobs(logits_SV, torch.tensor([0, 1, 2])).dtype == expected
    assert token_entropies(logits_SV).dtype == expected
    assert shape_logits(logits_SV).dtype == expected
    assert shape_logits(logits_SV, 0.7, 0.9).dtype == expected


# Kills: sign of token_logprobs; mean reduction.
def test_logprob_by_hand() -> None:
    # exp(0) : exp(log 3) = 1 : 3.
    logits_SV = double(0.0, math.log(3.0)).expand(2, 2)
    assert_close(token_logprobs(logits_SV, torch.tensor([0, 1])), double(math.log(0.25), math.log(0.75)))


def test_logprobs_are_log_softmax_and_their_gradient_is_one_hot_minus_softmax() -> None:
    generator = torch.Generator().manual_seed(0)
    logits_SV = torch.randn(7, 11, generator=generator, dtype=torch.float64).mul(5).requires_grad_()
    target_S = torch.arange(7)
    logps_S = token_logprobs(logits_SV, target_S)
    assert_close(logps_S, logits_SV.log_softmax(-1)[torch.arange(7), target_S])
    (gradient_SV,) = torch.autograd.grad(logps_S.sum(), logits_SV)
    assert_close(gradient_SV, torch.eye(7, 11, dtype=torch.float64) - logits_SV.softmax(-1))
    assert_close(token_logprobs(logits_SV + 100.0, target_S), logps_S)


# Kills: upcast after the log-softmax instead of before it (off by up to 0.02 here).
def test_bfloat16_logits_are_normalised_in_fp32() -> None:
    logits_SV = torch.randn(50, 1000, generator=torch.Generator().manual_seed(0)).bfloat16()
    target_S = torch.arange(50)
    exact_S = logits_SV.double().log_softmax(-1)[torch.arange(50), target_S]
    assert_close(token_logprobs(logits_SV, target_S).double(), exact_S, rtol=0, atol=2e-6)
    exact_entropy_S = torch.distributions.Categorical(logits=logits_SV.double()).entropy()
    assert_close(token_entropies(logits_SV).double(), exact_entropy_S, rtol=0, atol=1e-5)


def test_no_scored_token_gives_an_empty_tensor() -> None:
    logits_SV = torch.zeros(0, 5, requires_grad=True)
    assert token_logprobs(logits_SV, torch.zeros(0, dtype=torch.long)).shape == (0,)
    assert token_entropies(logits_SV).shape == (0,)


# Kills: sign of the entropy; log2; masked_fill dropped (0 * -inf = NaN).
def test_entropies_by_hand() -> None:
    logits_SV = torch.stack(
        [
            double(1.0, 1.0, 1.0, 1.0),  # uniform: log 4
            double(math.log(2.0), 0.0, 0.0, -INF),  # 1/2 1/4 1/4: 1/2 log 2 + 2 * 1/4 log 4 = 3/2 log 2
            double(0.0, 0.0, -INF, -INF),  # log 2
            double(-INF, 7.0, -INF, -INF),  # a point mass: 0
            double(1000.0, 0.0, 0.0, 0.0),  # a point mass in floating point: 0
        ]
    )
    log2 = math.log(2.0)
    assert_close(token_entropies(logits_SV), double(2 * log2, 1.5 * log2, log2, 0.0, 0.0))


def test_entropy_with_excluded_tokens_has_the_gradient_of_the_rest() -> None:
    logits_SV = torch.tensor([[0.3, -INF, 1.1, -INF]], dtype=torch.float64, requires_grad=True)
    rest_SV = torch.tensor([[0.3, 1.1]], dtype=torch.float64, requires_grad=True)
    (gradient_SV,) = torch.autograd.grad(token_entropies(logits_SV).sum(), logits_SV)
    (expected_SV,) = torch.autograd.grad(token_entropies(rest_SV).sum(), rest_SV)
    assert_close(gradient_SV, torch.tensor([[expected_SV[0, 0], 0.0, expected_SV[0, 1], 0.0]], dtype=torch.float64))


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.lists(st.floats(-30, 30, width=32), min_size=1, max_size=8))
def test_entropy_lies_between_0_and_that_of_the_uniform(logits: list[float]) -> None:
    entropy = token_entropies(torch.tensor([logits])).item()
    assert 0.0 <= entropy <= math.log(len(logits)) + 1e-5


# Kills: logits * temperature; temperature after the nucleus.
def test_temperature_divides_and_comes_before_the_nucleus() -> None:
    logits_SV = double(math.log(8.0), 0.0, 0.0, 0.0)[None]  # 8 : 1 : 1 : 1
    assert torch.equal(shape_logits(logits_SV), logits_SV)
    assert_close(shape_logits(logits_SV, temperature=3.0).softmax(-1), double(2.0, 1.0, 1.0, 1.0)[None] / 5)
    # The first token has 8/11 > 0.7 of the mass; tempered, 2/5, and 0.7 takes two more.
    assert shape_logits(logits_SV, top_p=0.7).isfinite().sum() == 1
    assert shape_logits(logits_SV, temperature=3.0, top_p=0.7).isfinite().sum() == 3


# Kills: > for >= (a set that reaches top_p exactly is enough); mass after instead of before; scatter dropped.
@pytest.mark.parametrize(
    ("top_p", "kept"), [(0.1, 1), (0.5, 1), (0.51, 2), (0.75, 2), (0.76, 3), (0.9, 4), (0.999, 4), (1.0, 4)]
)
def test_nucleus_by_hand(top_p: float, kept: int) -> None:
    # 1/2, 1/4, 1/8, 1/8; the second row has them in another order.
    probs_SV = double(0.5, 0.25, 0.125, 0.125).repeat(2, 1)
    order = torch.tensor([3, 1, 0, 2])
    probs_SV[1] = probs_SV[1, order]
    shaped_SV = shape_logits(probs_SV.log(), top_p=top_p)
    assert shaped_SV.isfinite().sum(-1).tolist() == [kept, kept]
    if kept != 3:  # which of the two equal ones stays is not defined
        assert torch.equal(shaped_SV[0, order], shaped_SV[1])
    inside_SV = shaped_SV.isfinite()
    assert torch.equal(shaped_SV[inside_SV], probs_SV.log()[inside_SV])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.integers(-8, 8), min_size=1, max_size=9), st.floats(0.05, 0.99))
def test_nucleus_is_the_smallest_set_that_reaches_top_p(logits: list[int], top_p: float) -> None:
    logits_V = double(*logits)
    probs_V = logits_V.softmax(-1)
    inside_V = shape_logits(logits_V[None], top_p=top_p)[0].isfinite()
    assert probs_V[inside_V].sum() >= top_p - 1e-9
    assert probs_V[inside_V].sum() - probs_V[inside_V].min() < top_p + 1e-9
    assert not (~inside_V).any() or probs_V[inside_V].min() >= probs_V[~inside_V].max()


# Kills: keep_S ignored; keep_S drops instead of keeping.
def test_the_kept_token_stays_finite_whatever_its_rank() -> None:
    logits_SV = double(3.0, 2.0, 1.0, 0.0).repeat(4, 1)
    keep_S = torch.arange(4)
    shaped_SV = shape_logits(logits_SV, top_p=0.8, keep_S=keep_S)  # the first two have 0.88 of the mass
    assert shaped_SV.isfinite().int().tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 0, 1]]
    logps_S = token_logprobs(shaped_SV, keep_S)
    assert_close(logps_S[3].exp(), 1 / (math.exp(3.0) + math.exp(2.0) + double(1.0)).squeeze())


def test_logprobs_in_the_nucleus_have_a_finite_gradient() -> None:
    logits_SV = torch.tensor([[3.0, 2.0, 1.0, 0.0]], dtype=torch.float64, requires_grad=True)
    token_logprobs(shape_logits(logits_SV, 0.5, 0.9), torch.tensor([1])).sum().backward()
    assert logits_SV.grad is not None
    # Temperature 1/2 doubles the logits; e^6 and e^4 are the nucleus, p = 0.88 and 0.12; d/dlogit = 2 (1 - p).
    p = 1 / (1 + math.exp(-2.0))
    assert_close(logits_SV.grad, double(-2 * p, 2 * p, 0.0, 0.0)[None])


# Kills: range check dropped.
@pytest.mark.parametrize(("temperature", "top_p"), [(0.0, 1.0), (-1.0, 1.0), (1.0, 0.0), (1.0, 1.1), (1.0, -0.5)])
def test_temperature_and_top_p_out_of_range_are_errors(temperature: float, top_p: float) -> None:
    with pytest.raises(ValueError, match="temperature"):
        shape_logits(torch.zeros(1, 3), temperature, top_p)


# Kills: length taken from the data instead of num_sequences.
def test_sums_by_sequence_by_hand() -> None:
    values_S = torch.tensor([1.0, 2.0, 4.0, 8.0], requires_grad=True)
    sums_Q = sum_by_sequence(values_S, torch.tensor([0, 0, 2, 0]), 4)
    assert sums_Q.tolist() == [11.0, 0.0, 4.0, 0.0]
    (sums_Q * torch.tensor([1.0, 10.0, 100.0, 1000.0])).sum().backward()
    assert values_S.grad is not None
    assert values_S.grad.tolist() == [1.0, 1.0, 100.0, 1.0]


# Kills: the end of a sequence without tokens taken for that of the one before.
def test_ends_are_last_tokens_and_nothing_without_tokens() -> None:
    values_S, sequence_S = double(1.0, 2.0, 3.0), torch.tensor([1, 1, 3])
    ends_Q = double(10.0, 20.0, 30.0, 40.0, 50.0)
    assert_close(add_at_ends(values_S, ends_Q, sequence_S), double(1.0, 22.0, 43.0))
    assert_close(add_at_ends(values_S[:0], ends_Q, sequence_S[:0]), values_S[:0])
