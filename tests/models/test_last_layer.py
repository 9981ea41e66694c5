"""The last layer, computed for the tokens that are read: the same numbers, from fewer rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.tiny import ARCHITECTURES, norms_in_float64, tiny_config
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from lit_align.functional.packing import pack
from lit_align.models import LanguageModel, ScalarModel, tree_attention
from lit_align.models.last_layer import PER_TOKEN, last_layer
from lit_align.models.tree_attention import TreeBlocks, attend_by_tree
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
    hfs = [AutoModelForCausalLM.from_config(config, dtype=torch.float64)]
    config.num_labels = 1
    hfs.append(AutoModelForSequenceClassification.from_config(config, dtype=torch.float64))
    for hf in hfs if by_tree else []:
        attend_by_tree(hf)
    with norms_in_float64():
        for model in (LanguageModel(hfs[0]).eval(), ScalarModel(hfs[1]).eval()):
            assert model.thrifty
            assert model.by_tree == by_tree
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


# Kills: queries of every token in the last layer's attention; a mask of other rows where no block branches.
@pytest.mark.parametrize("branches", [1, 2])
def test_only_what_is_read_attends_in_the_last_layer(monkeypatch: pytest.MonkeyPatch, branches: int) -> None:
    draw = torch.Generator().manual_seed(3)

    def segment(length: int) -> Segment:
        return Segment(torch.randint(1, 60, (length,), generator=draw).tolist(), [False] * length)

    trees = pack([Example(segment(90), [segment(60) for _ in range(branches)]) for _ in range(3)], row_tokens=400)
    config = tiny_config("llama", num_labels=1, max_position_embeddings=400)
    hf = AutoModelForSequenceClassification.from_config(config, dtype=torch.float64)
    attend_by_tree(hf)
    scalar = ScalarModel(hf).eval()
    queries: dict[int, list[int]] = {}

    def attend(module: Any, query: Tensor, *more: Any, **options: Any) -> Any:
        queries.setdefault(module.layer_idx, []).append(query.shape[2])
        return sdpa_attention_forward(module, query, *more, **options)

    monkeypatch.setattr(tree_attention, "sdpa_attention_forward", attend)
    with norms_in_float64():
        got = scalar(trees)
        assert queries.pop(max(queries)) == [branches] * 3
        assert {tuple(lengths) for lengths in queries.values()} == {(90 + 60 * branches,) * 3}
        scalar.thrifty = False
        assert (got - scalar(trees)).abs().max() < 1e-12


# Kills: a token counted in its neighbour's block; rows counted from elsewhere than the block's start.
def test_blocks_of_some_queries() -> None:
    branching = torch.full((1, 1, 4, 4), -torch.inf).triu(1)
    blocks = TreeBlocks([5, 3, 4, 2], [None, None, branching, None]).only(torch.tensor([0, 2, 4, 8, 11, 12]))
    assert blocks.counts == [3, 0, 2, 1]
    first, none, third, last = blocks.masks
    assert first is not None
    assert first[0, 0].tolist() == [[True] + 4 * [False], 3 * [True] + 2 * [False], 5 * [True]]
    assert none is not None
    assert none.shape == (1, 1, 0, 3)
    assert third is not None
    assert torch.equal(third, branching[:, :, [0, 3]])
    assert last is not None
    assert last[0, 0].tolist() == [[True, False]]


def test_a_layer_that_is_computed_again_in_backward_is_computed_whole() -> None:
    torch.manual_seed(0)
    model = LanguageModel(AutoModelForCausalLM.from_config(tiny_config("llama"), dtype=torch.float64))
    model.train()
    expected = gradients(model, model(batch()).logps_S.sum())
    enable = getattr(model.hf, "activation_checkpointing_enable", None) or model.hf.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    for ours, theirs in zip(gradients(model, model(batch()).logps_S.sum()), expected, strict=True):
        assert (ours - theirs).abs().max() < 1e-12
