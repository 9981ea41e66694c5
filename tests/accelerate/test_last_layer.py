"""The last layer, computed for the tokens that are read: the same numbers, from fewer rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.tiny import ARCHITECTURES, norms_in_float64, tiny_config
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from lit_align.accelerate import tree_attention
from lit_align.accelerate.last_layer import PER_TOKEN, last_layer
from lit_align.accelerate.tree_attention import TreeBlocks, put_on_tree_attention
from lit_align.functional.packing import pack
from lit_align.models import LanguageModel, ScalarModel
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
        put_on_tree_attention(hf)
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


# Kills: queries of every token in the last layer's attention; a mask of other rows where no block branches; a call
# without queries, for a tree of which nothing is read; a mask for a chain that is read almost whole.
@pytest.mark.parametrize(("branches", "scored", "queries"), [(1, 3, [3, 3]), (2, 3, [6, 6]), (1, 100, [150, 150])])
def test_only_what_is_read_attends_in_the_last_layer(
    monkeypatch: pytest.MonkeyPatch, branches: int, scored: int, queries: list[int]
) -> None:
    draw = torch.Generator().manual_seed(3)

    def segment(length: int, scored: int = 0) -> Segment:
        tokens = torch.randint(1, 60, (length,), generator=draw).tolist()
        return Segment(tokens, [False] * (length - scored) + [True] * scored)

    trees = [Example(segment(30), [segment(120, scored) for _ in range(branches)]) for _ in range(2)]
    packed = pack([trees[0], Example(segment(150)), trees[1]], row_tokens=700)
    hf = AutoModelForCausalLM.from_config(tiny_config("llama", max_position_embeddings=700), dtype=torch.float64)
    put_on_tree_attention(hf)
    language = LanguageModel(hf).eval()
    assert language.by_tree
    seen: list[int] = []

    def attend(query: Tensor, *more: Any, **options: Any) -> Tensor:
        seen.append(query.shape[2])
        return scaled_dot_product_attention(query, *more, **options)

    monkeypatch.setattr(tree_attention, "scaled_dot_product_attention", attend)
    results = []
    with norms_in_float64():
        for language.thrifty in (True, False):
            logps = language(packed).logps_S
            results.append([logps, *gradients(language, logps.square().sum())])
    sizes = [30 + 120 * branches, 150, 30 + 120 * branches]
    # Two layers of a model that computes little in its last one, then two of one that computes all.
    last = len(sizes) + len(queries)
    assert sorted(seen[: len(sizes)]) == sorted(seen[last:][: len(sizes)]) == sorted(sizes)
    assert sorted(seen[len(sizes) : last]) == sorted(queries)
    assert sorted(seen[last + len(sizes) :]) == sorted(sizes)
    for ours, theirs in zip(*results, strict=True):
        assert (ours - theirs).abs().max() < 1e-12


@pytest.mark.parametrize("thrifty", [True, False])
def test_nothing_is_read(thrifty: bool) -> None:
    hf = AutoModelForCausalLM.from_config(tiny_config("llama"))
    put_on_tree_attention(hf)
    language = LanguageModel(hf)
    language.thrifty = thrifty
    assert language(pack([Example(Segment([5, 6, 7], [False] * 3))])).logps_S.shape == (0,)


# Kills: a token counted in its neighbour's block; rows counted from elsewhere than the block's start.
def test_blocks_of_some_queries() -> None:
    branching = torch.full((1, 1, 6, 6), -torch.inf).triu(1)
    whole = TreeBlocks([5, 3, 6, 2, 3], [None, None, branching, None, None])
    blocks = whole.only(torch.tensor([0, 2, 8, 11, 14, 16, 17]))
    assert blocks.counts == [2, 0, 2, 1, 3]
    assert blocks.read is not None
    assert blocks.read.tolist() == [0, 2, 8, 11, 14, 16, 17, 18]
    first, none, third, fourth, most = blocks.masks
    assert first is not None
    assert first[0, 0].tolist() == [[True] + 4 * [False], 3 * [True] + 2 * [False]]
    assert none is not None
    assert none.shape == (1, 1, 0, 3)
    assert third is not None
    assert torch.equal(third, branching[:, :, [0, 3]])
    assert fourth is not None
    assert fourth[0, 0].tolist() == [[True, False]]
    assert most is None


def test_a_layer_that_is_computed_again_in_backward_is_computed_whole() -> None:
    torch.manual_seed(0)
    model = LanguageModel(AutoModelForCausalLM.from_config(tiny_config("llama"), dtype=torch.float64))
    model.train()
    expected = gradients(model, model(batch()).logps_S.sum())
    enable = getattr(model.hf, "activation_checkpointing_enable", None) or model.hf.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    for ours, theirs in zip(gradients(model, model(batch()).logps_S.sum()), expected, strict=True):
        assert (ours - theirs).abs().max() < 1e-12
