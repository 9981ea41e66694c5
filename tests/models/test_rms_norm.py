from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support.tiny import tiny_config
from torch import Tensor
from transformers import AutoModelForCausalLM

from lit_align.models.rms_norm import normalize_in_few_passes, rms_norm


def norms(name: str) -> tuple[Any, type]:
    model = AutoModelForCausalLM.from_config(tiny_config(name))
    kinds = {type(module) for module in model.modules() if type(module).__name__.endswith("RMSNorm")}
    assert len(kinds) == 1
    return model, kinds.pop()


def plain(kind: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The class without what other tests have put there."""
    theirs = getattr(kind.forward, "theirs", kind.forward)
    monkeypatch.setattr(kind, "forward", theirs)
    return theirs


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
def test_values_are_those_of_transformers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, kind = norms(name)
    theirs = plain(kind, monkeypatch)
    normalize_in_few_passes(model)
    assert kind.forward is not theirs  # type: ignore[attr-defined]
    layer = next(module for module in model.modules() if isinstance(module, kind))
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

    theirs = OtherRMSNorm.forward
    normalize_in_few_passes(torch.nn.Sequential(OtherRMSNorm()))  # type: ignore[arg-type]
    assert OtherRMSNorm.forward is theirs


# Kills: a layer that adds 1 to its weights, taken for one that does not.
def test_others_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model, kind = norms("gemma2")
    theirs = plain(kind, monkeypatch)
    normalize_in_few_passes(model)
    assert kind.forward is theirs  # type: ignore[attr-defined]


# Kills: a forward inside a forward with every model that is loaded; a probe where models are made, and as they are.
def test_it_is_put_there_once_wherever_models_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    model, kind = norms("llama")
    theirs = plain(kind, monkeypatch)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            normalize_in_few_passes(model.to("meta"))
    finally:
        torch.set_default_dtype(before)
    ours = kind.forward  # type: ignore[attr-defined]
    assert ours is not theirs
    normalize_in_few_passes(model)
    assert kind.forward is ours  # type: ignore[attr-defined]


# Kills: a product of bf16 in the gradient; bf16 states and fp32 weights, normalised as bf16.
def test_other_precisions_are_left_to_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    model, kind = norms("llama")
    theirs = plain(kind, monkeypatch)
    normalize_in_few_passes(model)
    layer = next(module for module in model.modules() if isinstance(module, kind))
    x = torch.randn(2, 3, len(layer.weight))
    torch.testing.assert_close(layer(x.bfloat16()), theirs(layer, x.bfloat16()), rtol=0, atol=0)
    mixed = copy.deepcopy(layer).bfloat16()
    mixed(x.clone().requires_grad_()).sum().backward()  # of two precisions
    with torch.autocast("cpu", torch.bfloat16):
        assert type(layer(x.requires_grad_()).grad_fn).__name__ != "_RMSNormBackward"
    assert type(layer(x).grad_fn).__name__ == "_RMSNormBackward"
