from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from support.tiny import tiny_config
from torch import Tensor
from transformers import AutoModelForCausalLM

from lit_align.accelerate.norm import put_on_norm, rms_norm


def norms(name: str) -> tuple[Any, type]:
    model = AutoModelForCausalLM.from_config(tiny_config(name))
    kinds = {type(module) for module in model.modules() if type(module).__name__.endswith("RMSNorm")}
    assert len(kinds) == 1
    return model, kinds.pop()


def layer_of(model: Any, kind: type) -> Any:
    return next(module for module in model.modules() if isinstance(module, kind))


def has_kernel(layer: Any) -> bool:
    return "forward" in vars(layer)


def states(*shape: int) -> tuple[Tensor, Tensor]:
    seeded = torch.Generator().manual_seed(0)
    x = torch.randn(*shape, generator=seeded, dtype=torch.float64)
    weight = torch.randn(shape[-1], generator=seeded, dtype=torch.float64)
    return x.requires_grad_(), weight.requires_grad_()


# Kills: the mean left out of the gradient; the weight's gradient of one row; weights that are forgotten.
@pytest.mark.parametrize("shape", [(8,), (3, 8), (2, 3, 8), (2, 3, 2, 8)])
def test_the_gradient_is_that_of_finite_differences(shape: tuple[int, ...]) -> None:
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, 1e-3), states(*shape))


# Kills: a gradient that only comes with the other's.
@pytest.mark.parametrize("frozen", [0, 1])
def test_one_of_both_may_be_frozen(frozen: int) -> None:
    inputs = list(states(3, 8))
    inputs[frozen] = inputs[frozen].detach()
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, 1e-3), inputs)


# Kills: eps outside the root, or the layer's own eps not read.
@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral"])
def test_values_are_those_of_transformers(name: str) -> None:
    model, kind = norms(name)
    theirs = kind.forward  # type: ignore[attr-defined]
    put_on_norm(model)
    layer = layer_of(model, kind)
    assert has_kernel(layer)
    for attribute in ("variance_epsilon", "eps"):
        if hasattr(layer, attribute):
            setattr(layer, attribute, 0.5)
    x, weight = (tensor.detach().float() for tensor in states(2, 3, len(layer.weight)))
    layer.weight.data = weight
    torch.testing.assert_close(layer(x), theirs(layer, x), rtol=1e-6, atol=1e-6)


# Kills: a probe whose eps is too small to be seen.
def test_a_layer_that_adds_eps_elsewhere_is_left_alone() -> None:
    class OtherRMSNorm(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.eps = torch.nn.Parameter(torch.ones(8)), 1e-6

        def forward(self, x: Tensor) -> Tensor:
            return self.weight * x / (x.square().mean(-1, keepdim=True).sqrt() + self.eps)

    layer = OtherRMSNorm()
    put_on_norm(torch.nn.Sequential(layer))
    assert not has_kernel(layer)


# Kills: a layer that adds 1 to its weights, taken for one that does not.
def test_others_are_left_alone() -> None:
    model, kind = norms("gemma2")
    put_on_norm(model)
    assert not has_kernel(layer_of(model, kind))


# Kills: a class patched for every model; one instance that stands for all of its class (Gemma 4, Liger 390).
def test_each_instance_is_looked_at_and_no_class_is_changed() -> None:
    class SomeRMSNorm(torch.nn.Module):
        def __init__(self, weighted: bool) -> None:
            super().__init__()
            self.eps = 1e-6
            if weighted:
                self.weight = torch.nn.Parameter(torch.ones(8))

        def forward(self, x: Tensor) -> Tensor:
            normed = x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt()
            return normed * self.weight if hasattr(self, "weight") else normed

    theirs = SomeRMSNorm.forward
    layers = torch.nn.Sequential(SomeRMSNorm(True), SomeRMSNorm(False))
    x = torch.randn(2, 8)
    expected = layers(x)
    put_on_norm(layers)
    assert SomeRMSNorm.forward is theirs
    assert [has_kernel(layer) for layer in layers] == [True, False]
    torch.testing.assert_close(layers(x), expected, rtol=1e-6, atol=1e-6)


# Kills: a copy (a reference, say) that computes with the weights of its original.
def test_a_copy_computes_with_its_own_weights() -> None:
    model, kind = norms("llama")
    put_on_norm(model)
    twin = layer_of(copy.deepcopy(model), kind)
    assert has_kernel(twin)
    twin.weight.data = torch.full_like(twin.weight, 3.0)
    x = torch.randn(2, len(twin.weight))
    torch.testing.assert_close(twin(x), kind.forward(twin, x), rtol=1e-6, atol=1e-6)  # type: ignore[attr-defined]


# Kills: a bound method, which pickle looks for by its name and does not find.
def test_a_model_can_be_pickled() -> None:
    model, kind = norms("llama")
    put_on_norm(model)
    twin = layer_of(pickle.loads(pickle.dumps(model)), kind)
    twin.weight.data = torch.full_like(twin.weight, 3.0)
    x = torch.randn(2, len(twin.weight))
    torch.testing.assert_close(twin(x), kind.forward(twin, x), rtol=1e-6, atol=1e-6)  # type: ignore[attr-defined]


# Kills: a forward inside a forward; a probe where models are made, and as they are.
def test_it_is_put_there_once_wherever_models_are_made() -> None:
    model, kind = norms("llama")
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            put_on_norm(model.to("meta"))
    finally:
        torch.set_default_dtype(before)
    layer = layer_of(model, kind)
    ours = layer.forward
    assert has_kernel(layer)
    put_on_norm(model)
    assert layer.forward is ours


# Kills: a product of bf16 in the gradient; bf16 states and fp32 weights, normalised as bf16.
def test_other_precisions_are_left_to_transformers() -> None:
    model, kind = norms("llama")
    theirs = kind.forward  # type: ignore[attr-defined]
    put_on_norm(model)
    layer = layer_of(model, kind)
    x = torch.randn(2, 3, len(layer.weight))
    torch.testing.assert_close(layer(x.bfloat16()), theirs(layer, x.bfloat16()), rtol=0, atol=0)
    mixed = copy.deepcopy(layer).bfloat16()
    mixed(x.clone().requires_grad_()).sum().backward()  # of two precisions
    with torch.autocast("cpu", torch.bfloat16):
        assert type(layer(x.requires_grad_()).grad_fn).__name__ != "_RMSNormBackward"
    assert type(layer(x).grad_fn).__name__ == "_RMSNormBackward"
