"""Each option of `Lora` computes what its paper says, leaves the reference alone, and is kept by both exports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models.test_reload import disturb, embeddings
from support.tiny import tiny_folder
from torch import Tensor

from lit_align.models import LanguageModel, Lora, Network, load_causal_lm, load_scorer
from lit_align.models.export import export
from lit_align.models.lora import adapters_off
from lit_align.models.reload import check_export
from lit_align.models.roles import ScalarAdapter
from lit_align.utils import versions

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

IDS = torch.tensor([[1, 40, 50, 60, 70, 80]])
OPTIONS: dict[str, dict[str, Any]] = {
    "rslora": {"rslora": True},
    "dora": {"dora": True},
    "dora of embeddings": {"dora": True, "targets": ["all-linear", "embeddings"]},
    "gaussian": {"init": "gaussian"},
    "orthogonal": {"init": "orthogonal"},
    "embeddings whole": {"modules_to_save": ["embeddings"]},
    "head whole": {"modules_to_save": ["head"]},
    "both whole": {"modules_to_save": ["embeddings", "head"]},
    "a block whole": {"modules_to_save": ["mlp"]},
    "rank_pattern": {"rank_pattern": {"projection": 2}},
    "alpha_pattern": {"alpha_pattern": {"projection": 64}},
}
NAMES = {
    "llama": {"embeddings": "embed_tokens", "head": "lm_head", "projection": "v_proj"},
    "gpt2": {"embeddings": "wte", "head": "lm_head", "projection": "c_attn"},  # tied
}


def options(architecture: str, name: str) -> Lora:
    names = NAMES[architecture]
    told = {
        key: [names.get(x, x) for x in value]
        if isinstance(value, list)
        else {names.get(x, x): number for x, number in value.items()}
        if isinstance(value, dict)
        else value
        for key, value in OPTIONS[name].items()
    }
    return Lora(r=4, **told)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("architecture", NAMES)
def test_every_option_survives_both_exports(architecture: str, option: str, tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "start", architecture)
    for load in (load_causal_lm, load_scorer):
        if load is load_scorer and "head" in str(OPTIONS[option]):
            continue
        model = load(Network(folder, dtype="float64", lora=options(architecture, option)))
        disturb(model)
        assert check_export(model, parent=tmp_path) < 1e-5
        assert check_export(model, adapter=True, parent=tmp_path) < 1e-5


# Kills: what is trained whole left on in the reference; an adapter that starts from an update.
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("architecture", NAMES)
def test_the_reference_is_the_model_as_it_was(architecture: str, option: str, tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "start", architecture)
    with torch.no_grad():
        before = load_causal_lm(Network(folder, dtype="float64"))(IDS).logits
        model = load_causal_lm(Network(folder, dtype="float64", lora=options(architecture, option)))
        assert (model(IDS).logits - before).abs().max() < 1e-5
        disturb(model)
        assert (model(IDS).logits - before).abs().max() > 0.1
        with adapters_off(model):
            assert torch.equal(model(IDS).logits, before)
        assert (model(IDS).logits - before).abs().max() > 0.1


def layer(tmp_path: Path, lora: Lora) -> tuple[Any, Tensor, Tensor, Tensor, Tensor]:
    """A layer with its weight, its two matrices, and an input."""
    folder = tiny_folder(tmp_path / "start")
    model: Any = load_causal_lm(Network(folder, dtype="float64", lora=lora))
    disturb(model)
    module = model.model.layers[0].self_attn.v_proj
    matrices = module.lora_A["lit_align"].weight, module.lora_B["lit_align"].weight
    return module, module.base_layer.weight, *matrices, torch.randn(5, 32, dtype=torch.float64)


@pytest.mark.parametrize(
    ("lora", "scale"),
    [
        (Lora(r=4, alpha=6), 1.5),
        (Lora(r=4, alpha=6, rslora=True), 3.0),
        (Lora(r=2, alpha=6, rank_pattern={"v_proj": 4}), 1.5),
        (Lora(r=4, alpha=8, alpha_pattern={"v_proj": 6}), 1.5),
    ],
)
def test_the_scale_is_that_of_the_papers(lora: Lora, scale: float, tmp_path: Path) -> None:
    module, weight, first, second, x = layer(tmp_path, lora)
    assert first.shape == (4, 32)
    assert torch.allclose(module(x), x @ (weight + scale * second @ first).T, atol=1e-12)


# Liu et al. 2024, equations 5 and 11: the norm is a constant in backward.
def test_dora_scales_the_rows_of_the_sum_to_a_learned_length(tmp_path: Path) -> None:
    module, weight, first, second, x = layer(tmp_path, Lora(r=4, alpha=6, dora=True))
    length = module.lora_magnitude_vector["lit_align"].weight
    got = module(x)
    whole = weight + 1.5 * second @ first
    expected = x @ (length[:, None] * whole / whole.norm(dim=1, keepdim=True).detach()).T
    assert torch.allclose(got, expected, atol=1e-12)
    trained = [first, second, length]
    for ours, theirs in zip(
        torch.autograd.grad(got.square().sum(), trained),
        torch.autograd.grad(expected.square().sum(), trained),
        strict=True,
    ):
        assert torch.allclose(ours, theirs, atol=1e-10)


def test_adapters_start_without_an_update(tmp_path: Path) -> None:
    for init in ("default", "gaussian", "orthogonal"):
        model: Any = load_causal_lm(Network(tiny_folder(tmp_path / init), dtype="float64", lora=Lora(r=4, init=init)))
        module = model.model.layers[0].self_attn.v_proj
        first, second = module.lora_A["lit_align"].weight, module.lora_B["lit_align"].weight
        assert (second @ first).abs().max() < 1e-6
        assert first.any()
        assert bool(second.any()) is (init == "orthogonal")


# Kills: input and output embeddings trained apart though the model ties them.
@pytest.mark.parametrize("architecture", NAMES)
def test_tied_weights_that_are_trained_whole_stay_tied(architecture: str, tmp_path: Path) -> None:
    names = NAMES[architecture]
    folder = tiny_folder(tmp_path / "start", architecture, tie_word_embeddings=True)
    for whole in ([names["embeddings"]], [names["head"]], [names["embeddings"], names["head"]]):
        model: Any = load_causal_lm(Network(folder, dtype="float64", lora=Lora(r=2, modules_to_save=whole)))
        disturb(model)
        inputs, outputs = embeddings(model)
        assert inputs.weight is outputs.weight
        gradient = torch.autograd.grad(LanguageModel(model).hf(IDS).logits.sum(), inputs.weight)[0]
        assert (gradient[200] != 0).any()  # of the head: the id is not among the inputs
        assert check_export(model, parent=tmp_path) < 1e-5
        assert check_export(model, adapter=True, parent=tmp_path) < 1e-5


def test_roles_on_a_policy_with_modules_that_are_trained_whole(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "start")
    policy = LanguageModel(load_causal_lm(Network(folder, lora=Lora(r=2, modules_to_save=["embed_tokens"]))))
    disturb(policy)
    alone = policy.hf(IDS).logits
    value = ScalarAdapter(policy, Network(folder, lora=Lora(r=2), shared=True), "value", trained=True)
    assert value.trained
    assert torch.equal(policy.hf(IDS).logits, alone)
    trained = {name for name, parameter in policy.named_parameters() if parameter.requires_grad}
    assert "hf.model.embed_tokens.modules_to_save.lit_align.weight" in trained
    assert any(".value." in name for name in trained)
    assert check_export(policy.hf, parent=tmp_path) < 1e-4
    plain = load_causal_lm(Network(folder))
    with adapters_off(policy):
        assert torch.equal(policy.hf(IDS).logits, plain(IDS).logits)


@pytest.mark.parametrize(
    ("told", "message"),
    [
        (
            {"init": "pissa"},
            r"lora.init must be one of default, gaussian, orthogonal, got 'pissa' \(it changes the model",
        ),
        ({"init": "zeros"}, r"lora.init must be one of default, gaussian, orthogonal, got 'zeros'$"),
        ({"r": 0}, "lora.r must be 1 or more, got 0"),
        ({"rank_pattern": {"q_proj": 0}}, "lora.rank_pattern.q_proj must be 1 or more, got 0"),
        (
            {"targets": ["lm_head"], "modules_to_save": ["lm_head"]},
            "'lm_head' is in targets and in modules_to_save: an adapter or the whole, not both",
        ),
    ],
)
def test_what_cannot_be_meant_is_refused_where_it_is_written(told: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Lora(**told)


@pytest.mark.parametrize(
    ("told", "message"),
    [
        (
            {"modules_to_save": ["lm_hed"]},
            "lora.modules_to_save: .* has no module named 'lm_hed', did you mean 'lm_head'",
        ),
        ({"rank_pattern": {"q_prj": 2}}, "lora.rank_pattern: .* has no module named 'q_prj', did you mean 'q_proj'"),
        ({"alpha_pattern": {"q_prj": 2}}, "lora.alpha_pattern: .* has no module named 'q_prj'"),
    ],
)
def test_names_that_are_not_in_the_model_are_refused(told: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        load_causal_lm(Network(tiny_folder(tmp_path / "start"), lora=Lora(**told)))


def test_dora_of_experts_is_refused(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "start", "mixtral", num_local_experts=4, num_key_value_heads=2)
    with pytest.raises(ValueError, match=r"lora.dora: True does not reach experts.down_proj: set it to 0 or false"):
        load_causal_lm(Network(folder, lora=Lora(dora=True, targets=["experts"])))


# What transformers 5.24 says to peft 0.21: its bound is a name in its module.
def test_a_peft_that_does_not_fit_transformers_is_one_line_with_the_tested_versions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.integrations.peft.MIN_PEFT_VERSION", "99.0.0")
    with pytest.raises(
        ValueError, match=r"lora: The version of PEFT .* 99.0.0; installed: peft .*, transformers .*;"
    ) as e:
        load_causal_lm(Network(tiny_folder(tmp_path / "start"), lora=Lora()))
    pins = {name: version for name, version in versions.tested().items() if name in ("peft", "transformers")}
    assert all(f"'{name}=={version}'" in str(e.value) for name, version in pins.items())
    assert len(pins) == 2
    assert "\n" not in str(e.value)


# Kills: an adapter of embeddings that no step has moved, taken for a damaged file; draws of the run moved by an export.
@pytest.mark.parametrize("adapter", [True, False])
def test_an_untrained_adapter_of_embeddings_is_exported_and_read(adapter: bool, tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "start", "llama")
    network = Network(folder, lora=Lora(r=2, targets=["embed_tokens", "q_proj"]))
    model = LanguageModel(load_causal_lm(network)).hf
    before = torch.get_rng_state()
    export(model, None, tmp_path / "out", adapter=adapter)
    assert torch.equal(torch.get_rng_state(), before)
    if adapter:
        load_causal_lm(Network(folder, adapter=str(tmp_path / "out")))
