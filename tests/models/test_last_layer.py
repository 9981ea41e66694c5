"""The last layer, computed for the tokens that are read: the same numbers, from fewer rows."""

from __future__ import annotations

import pytest
import torch
from support.tiny import ARCHITECTURES, norms_in_float64, tiny_config
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from lit_align.functional.packing import pack
from lit_align.models import LanguageModel, ScalarModel
from lit_align.models.last_layer import PER_TOKEN, last_layer
from lit_align.types import Example, PackedBatch, Segment


def batch() -> PackedBatch:
    """Two prompts of two answers, and a text; 31 tokens."""
    draw = torch.Generator().manual_seed(3)

    def segment(length: int, scored: bool) -> Segment:
        return Segment(torch.randint(1, 60, (length,), generator=draw).tolist(), [scored] * length)

    pairs = [Example(segment(n, False), [segment(3, True), segment(2, True)]) for n in (6, 9)]
    return pack([*pairs, Example(Segment([5, 6, 7, 8, 9, 2], [False, False, False, False, True, True]))], row_tokens=20)


def gradients(model: nn.Module, loss: Tensor) -> list[Tensor]:
    model.zero_grad()
    loss.backward()
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]


# Kills: positions counted in another row; a projection left out of the gradient; the feed-forward of other tokens kept.
@pytest.mark.parametrize("by_tree", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_states_and_gradients_are_those_of_the_whole_layer(architecture: str, by_tree: bool) -> None:
    torch.manual_seed(0)
    config = tiny_config(architecture)
    options = {"dtype": torch.float64}
    language = LanguageModel(AutoModelForCausalLM.from_config(config, **options))
    config.num_labels = 1
    scalar = ScalarModel(AutoModelForSequenceClassification.from_config(config, **options))
    with norms_in_float64():
        for model in (language.eval(), scalar.eval()):
            assert model.thrifty
            model.by_tree = by_tree and model.by_tree
            results = []
            for model.thrifty in (True, False):
                out = model(batch())
                values = out.logps_S if isinstance(model, LanguageModel) else out
                results.append([values, *gradients(model, values.square().sum())])
            for ours, theirs in zip(*results, strict=True):
                assert (ours - theirs).abs().max() < 1e-12


def test_only_what_is_read_is_computed() -> None:
    scalar = ScalarModel(AutoModelForSequenceClassification.from_config(tiny_config("llama", num_labels=1)))
    rows: dict[str, int] = {}
    layer = last_layer(scalar.backbone)
    assert layer is not None
    modules = {name: module for name, module in layer.named_modules() if name in PER_TOKEN}
    assert set(modules) == {"mlp", "self_attn.q_proj", "self_attn.o_proj"}
    inner = {"mlp": layer.mlp.up_proj, "k": layer.self_attn.k_proj}
    for name, module in inner.items():
        module.register_forward_hook(lambda m, i, o, name=name: rows.update({name: o.shape[:-1].numel()}))
    scalar(batch())
    # Five sequences end; keys are needed of all tokens.
    assert rows["mlp"] == 5
    assert rows["k"] >= 31


def test_a_layer_that_is_computed_again_in_backward_is_computed_whole() -> None:
    torch.manual_seed(0)
    model = LanguageModel(AutoModelForCausalLM.from_config(tiny_config("llama"), dtype=torch.float64))
    model.train()
    expected = gradients(model, model(batch()).logps_S.sum())
    enable = getattr(model.hf, "activation_checkpointing_enable", None) or model.hf.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    for ours, theirs in zip(gradients(model, model(batch()).logps_S.sum()), expected, strict=True):
        assert (ours - theirs).abs().max() < 1e-12
