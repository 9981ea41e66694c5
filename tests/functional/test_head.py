from __future__ import annotations

import pytest
import torch
from torch import Tensor

import lit_align.functional.head
from lit_align.functional.head import linear_logprobs, reference_logprobs
from lit_align.functional.logprobs import shape_logits, token_entropies

S, H, V = 11, 5, 17


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    seeded = torch.Generator().manual_seed(0)
    hidden = torch.randn(S, H, generator=seeded, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(V, H, generator=seeded, dtype=torch.float64).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(0, V, (S,), generator=seeded)


# Kills: the last, shorter chunk dropped; temperature left out of either gradient; onehot or p with the wrong sign;
# chunks of the weight's gradient overwritten, not added; a nucleus of the whole in backward.
@pytest.mark.parametrize("hold", [4, 5, None])
@pytest.mark.parametrize("chunk", [1, 4, 11, 100])
@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.6, 1.0), (1.3, 0.7)])
def test_scores_entropies_and_gradients_are_those_of_all_logits(
    chunk: int, temperature: float, top_p: float, hold: int | None
) -> None:
    hidden, weight, target = inputs()
    expected, entropies = reference_logprobs(hidden, weight, target, temperature, top_p)
    expected_gradients = torch.autograd.grad((expected * torch.arange(S)).sum(), (hidden, weight))
    got, spread = linear_logprobs(hidden, weight, target, temperature, top_p, entropies=True, chunk=chunk, hold=hold)
    assert spread is not None
    torch.testing.assert_close((got, spread), (expected, entropies), rtol=0, atol=1e-13)
    assert not spread.requires_grad
    gradients = torch.autograd.grad((got * torch.arange(S)).sum(), (hidden, weight))
    torch.testing.assert_close(gradients, expected_gradients, rtol=0, atol=1e-12)


# Kills: entropies by what pulls at a state where nothing does; by half a precision.
@pytest.mark.parametrize(("dtype", "top_p", "off"), [(torch.float64, 0.9, 1e-13), (torch.bfloat16, 1.0, 0.01)])
@pytest.mark.parametrize(("trained", "learning"), [([], True), ([0], True), ([1], True), ([0, 1], False)])
def test_entropies_are_the_same_whatever_is_trained(
    trained: list[int], learning: bool, dtype: torch.dtype, top_p: float, off: float
) -> None:
    *parts, target = inputs(dtype)
    for i, part in enumerate(parts):
        part.requires_grad_(i in trained)
    with torch.set_grad_enabled(learning):
        _, spread = linear_logprobs(*parts, target, 0.6, top_p, entropies=True, chunk=4)
    exact = reference_logprobs(*(part.detach().to(torch.float64) for part in parts), target, 0.6, top_p)[1]
    assert spread is not None
    assert (spread - exact).abs().max() < off


# Kills: sums over the vocabulary in what autocast makes of them; a logit outside the nucleus times 0.
@pytest.mark.parametrize("top_p", [1.0, 0.9])
@pytest.mark.parametrize("trained", [True, False])
def test_entropies_under_autocast(trained: bool, top_p: float) -> None:
    hidden, weight, target = inputs(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(trained):
        _, spread = linear_logprobs(hidden, weight, target, 1.0, top_p, entropies=True, chunk=4)
        logits = (hidden @ weight.T).float()
    assert spread is not None
    expected = token_entropies(shape_logits(logits, 1.0, top_p, keep_S=target))
    assert (spread - expected).abs().max() < 1e-5


# Kills: entropies from a product in TF32.
@pytest.mark.parametrize(("precision", "averaged"), [("highest", False), ("high", True), ("medium", True)])
def test_entropies_where_products_are_rounded(precision: str, averaged: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    average = lit_align.functional.head._average
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: precision)
    monkeypatch.setattr(lit_align.functional.head, "_average", lambda *call: calls.append(1) or average(*call))
    linear_logprobs(*inputs(torch.float32), entropies=True)
    assert bool(calls) == averaged


# Kills: probabilities, or the head, kept for the gradient of a head that has none, which adapters leave frozen.
@pytest.mark.parametrize(("trained", "kept"), [([0, 1], S * V), ([1], S * V), ([0], S * H)])
def test_a_frozen_head_keeps_no_probabilities(trained: list[int], kept: int) -> None:
    *parts, target = inputs()
    for i, part in enumerate(parts):
        part.requires_grad_(i in trained)
    sizes: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
        linear_logprobs(*parts, target)
    assert max(sizes) == kept


def test_gradient_is_that_of_finite_differences() -> None:
    hidden, weight, target = inputs()
    assert torch.autograd.gradcheck(lambda h, w: linear_logprobs(h, w, target, 0.8, chunk=4)[0], (hidden, weight))


# Kills: p for p - onehot where one of the two is frozen.
@pytest.mark.parametrize("hold", [3, None])
@pytest.mark.parametrize("frozen", [0, 1])
def test_only_what_is_trained_gets_a_gradient(frozen: int, hold: int | None) -> None:
    hidden, weight, target = inputs()
    parts = hidden, weight
    parts[frozen].requires_grad_(False)
    trained = parts[1 - frozen]
    expected = torch.autograd.grad(reference_logprobs(hidden, weight, target, 1.0, 1.0)[0].sum(), trained)[0]
    linear_logprobs(hidden, weight, target, chunk=4, hold=hold)[0].sum().backward()
    assert parts[frozen].grad is None
    assert trained.grad is not None
    assert (trained.grad - expected).abs().max() < 1e-12


# Kills: log-probabilities, or the sum of the weight's gradient over chunks, in the precision of the weights.
def test_half_precision_is_added_up_in_single() -> None:
    hidden, weight, target = inputs(torch.bfloat16)
    got, _ = linear_logprobs(hidden, weight, target, hold=1)
    assert got.dtype == torch.float32
    got.sum().backward()
    assert weight.grad is not None
    assert weight.grad.dtype == torch.bfloat16
    exact_hidden, exact_weight = (x.detach().double().requires_grad_() for x in (hidden, weight))
    reference_logprobs(exact_hidden, exact_weight, target, 1.0, 1.0)[0].sum().backward()
    assert exact_weight.grad is not None
    assert (weight.grad - exact_weight.grad).abs().max() < 0.02


# Kills: probabilities that are 0 in fp16, before the scale of the loss has made them larger.
def test_small_probabilities_count_in_fp16() -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(2, 8).half(), torch.randn(40_000, 8).half()
    weight[0] = hidden[0] * (20 / hidden[0].square().sum())
    hidden, weight, target = hidden.requires_grad_(), weight.requires_grad_(), torch.tensor([0, 0])
    logps, _ = linear_logprobs(hidden, weight, target)
    assert logps[0] > -0.1
    scale = 2.0**14
    (logps[0] * scale).backward()
    exact_hidden, exact_weight = (x.detach().double().requires_grad_() for x in (hidden, weight))
    reference_logprobs(exact_hidden, exact_weight, target, 1.0, 1.0)[0][0].backward()
    assert weight.grad is not None
    assert exact_weight.grad is not None
    torch.testing.assert_close(weight.grad[0].double() / scale, exact_weight.grad[0], rtol=0.02, atol=1e-3)
    small = exact_weight.grad.abs().amax(1).argsort()[:20_000]
    assert 0 < exact_weight.grad[small].abs().max() < 1e-7
    torch.testing.assert_close(
        (weight.grad.double() / scale)[small].sum(0), exact_weight.grad[small].sum(0), rtol=0.02, atol=0
    )


# Kills: what pulls at a state computed in fp16 before that.
def test_small_probabilities_pull_at_a_state_in_fp16() -> None:
    # 39,999 tokens share a thousandth, and pull the same way.
    hidden, weight = torch.tensor([[8.0, 0.0]]).half(), torch.tensor([[0.0, 4.0]]).repeat(40_000, 1).half()
    weight[0] = torch.tensor([2.2, 0.0])
    hidden.requires_grad_()
    logps, _ = linear_logprobs(hidden, weight, torch.tensor([0]))
    (logps[0] * 2.0**14).backward()
    assert hidden.grad is not None
    shared = -logps[0].detach().double().expm1()
    assert 5e-4 < shared < 2e-3
    torch.testing.assert_close(hidden.grad[0, 1].double() / 2**14, -4 * shared, rtol=0.1, atol=0)


def test_nothing_scored() -> None:
    hidden, weight, target = inputs()
    logps, entropies = linear_logprobs(hidden[:0], weight, target[:0], entropies=True)
    assert logps.shape == (0,)
    assert entropies is not None
    assert entropies.shape == (0,)
    logps.sum().backward()
    assert weight.grad is not None
    assert not weight.grad.any()


# Kills: probabilities that the first backward has written over.
def test_a_second_backward_gives_the_same() -> None:
    hidden, weight, target = inputs()
    logps, _ = linear_logprobs(hidden, weight, target)
    first = torch.autograd.grad(logps.sum(), (hidden, weight), retain_graph=True)
    second = torch.autograd.grad(logps.sum(), (hidden, weight))
    torch.testing.assert_close(first, second, rtol=0, atol=1e-13)


def test_without_gradients_nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple] = []
    empty = Tensor.new_empty
    monkeypatch.setattr(Tensor, "new_empty", lambda self, *size, **o: made.append(size) or empty(self, *size, **o))
    hidden, weight, target = inputs()
    with torch.no_grad():
        linear_logprobs(hidden, weight, target, chunk=3)
    assert (S, V) not in made
    assert (3, V) in made


# Kills: the logarithm of a probability that is 0 in fp32; entropies that are taken from it.
@pytest.mark.parametrize("scale", [90.0, 100.0, 1000.0])
def test_what_is_next_to_impossible_has_a_finite_score(scale: float) -> None:
    hidden, weight, target = inputs(torch.float32)
    scaled = (hidden.detach() * scale).requires_grad_()
    got, spread = linear_logprobs(scaled, weight, target, entropies=True, chunk=4)
    expected, entropies = reference_logprobs(scaled.double(), weight.double(), target, 1.0, 1.0)
    assert expected.min() < -100
    assert spread is not None
    torch.testing.assert_close(got, expected.float(), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(spread, entropies.float(), rtol=0, atol=1e-3 * scale / 90)
    assert spread.min() >= 0
    gradients = torch.autograd.grad(got.sum(), (scaled, weight))
    exact = torch.autograd.grad(expected.sum(), (scaled, weight))
    torch.testing.assert_close(gradients, exact, rtol=1e-4, atol=1e-3)
