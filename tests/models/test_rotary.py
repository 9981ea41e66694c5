from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from support.tiny import tiny_config
from torch import Tensor
from transformers import AutoModelForCausalLM

from lit_align.models.rotary import NAME, turn, turn_without_copies


def model_of(name: str) -> Any:
    return AutoModelForCausalLM.from_config(tiny_config(name))


def modeling(model: Any) -> Any:
    return sys.modules[type(model).__module__]


@pytest.fixture
def llama(monkeypatch: pytest.MonkeyPatch) -> Any:
    model = model_of("llama")
    theirs = getattr(modeling(model), NAME)
    monkeypatch.setattr(modeling(model), NAME, getattr(theirs, "theirs", theirs))
    return model


def states() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    seeded = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, heads, 5, 8, generator=seeded, dtype=torch.float64) for heads in (4, 2))
    angles = torch.randn(2, 5, 4, generator=seeded, dtype=torch.float64).repeat(1, 1, 2)
    return q.requires_grad_(), k.requires_grad_(), angles.cos(), angles.sin()


# Kills: halves swapped; the gradient turned the same way; a sign.
def test_values_and_gradients_are_those_of_transformers(llama: Any) -> None:
    theirs, (q, k, cos, sin) = getattr(modeling(llama), NAME), states()
    turn_without_copies(llama)
    ours = getattr(modeling(llama), NAME)
    assert ours is not theirs
    results = []
    for function in (theirs, ours):
        turned = function(q, k, cos, sin)
        weights = [torch.arange(x.numel(), dtype=torch.float64).view_as(x) for x in turned]
        results.append((*turned, *torch.autograd.grad(turned, (q, k), weights)))
    torch.testing.assert_close(*results, rtol=0, atol=1e-12)


def test_the_gradient_is_that_of_finite_differences() -> None:
    q, _, cos, sin = states()
    assert torch.autograd.gradcheck(lambda x: turn(x, cos[:, None], sin[:, None]), (q,))


# Kills: a function inside a function with every model that is loaded.
def test_it_is_put_there_once(llama: Any) -> None:
    turn_without_copies(llama)
    ours = getattr(modeling(llama), NAME)
    turn_without_copies(llama)
    assert getattr(modeling(llama), NAME) is ours


# Kills: a probe on the device or in the precision that models are made in, where it fails or sees rounding.
def test_it_is_put_there_wherever_models_are_made(llama: Any) -> None:
    theirs = getattr(modeling(llama), NAME)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            turn_without_copies(llama)
    finally:
        torch.set_default_dtype(before)
    assert getattr(modeling(llama), NAME) is not theirs


# Kills: neighbours turned as if they were halves.
@pytest.mark.parametrize("name", ["cohere", "gpt2"])
def test_others_are_left_alone(name: str) -> None:
    model = model_of(name)
    before = getattr(modeling(model), NAME, None)
    turn_without_copies(model)
    assert getattr(modeling(model), NAME, None) is before


def test_a_head_that_is_turned_in_part_is_left_to_transformers() -> None:
    model = model_of("gpt_neox")
    turn_without_copies(model)
    ours = getattr(modeling(model), NAME)
    q, k, cos, sin = states()
    got = ours(q, k, cos[..., :4], sin[..., :4])
    expected = getattr(ours, "theirs", ours)(q, k, cos[..., :4], sin[..., :4])
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
