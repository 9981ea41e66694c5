from __future__ import annotations

import copy
import pickle
import sys
from typing import Any

import pytest
import torch
from support.tiny import tiny_config
from torch import Tensor
from transformers import AutoModelForCausalLM

from lit_align.accelerate.rotary import NAME, forward_with_rotation, put_off_rotary, put_on_rotary, rotate


def model_of(name: str) -> Any:
    return AutoModelForCausalLM.from_config(tiny_config(name))


def theirs_of(model: Any) -> Any:
    return getattr(sys.modules[type(model).__module__], NAME, None)


def ours_of(model: Any) -> Any:
    """The function that the attention layers of this model call in its place; None if they call their own."""
    layers = [module for module in model.modules() if type(module).__name__.endswith("Attention")]
    changed = [layer for layer in layers if "forward" in vars(layer)]
    assert not changed or changed == layers
    forward: Any = forward_with_rotation(type(layers[0])) if changed else None
    return forward and forward.__globals__[NAME]


def states() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    seeded = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, heads, 5, 8, generator=seeded, dtype=torch.float64) for heads in (4, 2))
    angles = torch.randn(2, 5, 4, generator=seeded, dtype=torch.float64).repeat(1, 1, 2)
    return q.requires_grad_(), k.requires_grad_(), angles.cos(), angles.sin()


# Kills: halves swapped; the gradient turned the same way; a sign.
def test_values_and_gradients_are_those_of_transformers() -> None:
    model, (q, k, cos, sin) = model_of("llama"), states()
    put_on_rotary(model)
    results = []
    for function in (theirs_of(model), ours_of(model)):
        turned = function(q, k, cos, sin)
        weights = [torch.arange(x.numel(), dtype=torch.float64).view_as(x) for x in turned]
        results.append((*turned, *torch.autograd.grad(turned, (q, k), weights)))
    torch.testing.assert_close(*results, rtol=0, atol=1e-12)


def test_the_gradient_is_that_of_finite_differences() -> None:
    q, _, cos, sin = states()
    assert torch.autograd.gradcheck(lambda x: rotate(x, cos[:, None], sin[:, None]), (q,))


# Kills: a function of transformers' file replaced, for every model of that architecture.
def test_other_models_and_their_classes_stay_as_they_are() -> None:
    model, other = model_of("llama"), model_of("llama")
    kind, theirs = type(model.model.layers[0].self_attn), theirs_of(model)
    forward = kind.forward
    put_on_rotary(model)
    assert ours_of(model) is not None
    assert kind.forward is forward
    assert theirs_of(model) is theirs
    assert ours_of(other) is None
    put_off_rotary(model)
    assert ours_of(model) is None


# Kills: the layer that was copied in the place of the copy.
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_computes_with_its_own_weights(copied: Any) -> None:
    model = model_of("llama").eval()
    put_on_rotary(model)
    twin = copied(model)
    assert ours_of(twin) is not None
    for parameter in twin.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    ids = torch.tensor([[5, 6, 7, 8]])
    got = twin(ids).logits
    put_off_rotary(twin)
    torch.testing.assert_close(got, twin(ids).logits, rtol=1e-5, atol=1e-5)


# Kills: a probe on the device or in the precision that models are made in, where it fails or sees rounding.
def test_it_is_put_there_wherever_models_are_made() -> None:
    model = model_of("llama")
    forward_with_rotation.cache_clear()
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            put_on_rotary(model)
    finally:
        torch.set_default_dtype(before)
    assert ours_of(model) is not None


# Kills: neighbours turned as if they were halves.
@pytest.mark.parametrize("name", ["cohere", "gpt2"])
def test_others_are_left_alone(name: str) -> None:
    model = model_of(name)
    put_on_rotary(model)
    assert ours_of(model) is None


def test_a_head_that_is_turned_in_part_is_left_to_transformers() -> None:
    model = model_of("gpt_neox")
    put_on_rotary(model)
    ours = ours_of(model) or theirs_of(model)
    q, k, cos, sin = states()
    got = ours(q, k, cos[..., :4], sin[..., :4])
    torch.testing.assert_close(got, theirs_of(model)(q, k, cos[..., :4], sin[..., :4]), rtol=0, atol=0)
