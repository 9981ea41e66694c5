"""An exported folder, merged or adapter, is the model of the run: reloaded by plain transformers and peft."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tiny import tiny_folder
from torch import nn
from transformers import AutoModelForCausalLM

from lit_align.models import LanguageModel, Lora, Network, export, load_causal_lm, load_scorer
from lit_align.models.lora_targets import resolve_targets
from lit_align.models.reload import check_export, check_reload
from lit_align.models.roles import CONFIG, ScalarAdapter

# peft 0.21 asks transformers 5.23 by the older name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

SHAPES: dict[str, dict[str, Any]] = {
    "llama": {},
    "tied llama": {"tie_word_embeddings": True},
    "qwen3": {},
    "gpt2": {},
    "gpt_neox": {},
    "gemma3_text": {"head_dim": 8, "num_key_value_heads": 2},
    "mixtral": {"num_local_experts": 4, "num_key_value_heads": 2},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 8},
    "falcon_h1": {
        "mamba_d_ssm": 32,
        "mamba_n_heads": 4,
        "mamba_d_head": 8,
        "mamba_d_state": 8,
        "num_key_value_heads": 4,
    },
    "mamba": {"state_size": 4},
    "jamba": {"num_experts": 4, "num_key_value_heads": 2, "use_mamba_kernels": False, "mamba_d_state": 8},
}
MIXTURES = ("mixtral", "qwen3_moe", "jamba")
TIED = ("tied llama", "gpt2", "gemma3_text", "mamba")
RECURRENT = ("falcon_h1", "mamba")  # no class for reward models
CASES = [(n, what) for n in SHAPES for what in ("layers", "embeddings", "head")] + [(n, "experts") for n in MIXTURES]


def start(place: Path, name: str) -> str:
    return tiny_folder(place / "start", name.split()[-1], **SHAPES[name])


def disturb(module: nn.Module) -> None:
    """Give every trainable weight something to show."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))


def name_of(model: Any, module: nn.Module) -> str:
    """Last part of a module's path."""
    return next(path for path, other in model.named_modules() if other is module).rpartition(".")[2]


def targets_of(folder: str, what: str) -> list[str]:
    plain = AutoModelForCausalLM.from_pretrained(folder)
    more = {
        "layers": [],
        "embeddings": [name_of(plain, plain.get_input_embeddings())],
        "head": [name_of(plain, plain.get_output_embeddings())],
        "experts": ["experts"],
    }
    return ["all-linear", *more[what]]


@pytest.mark.filterwarnings("ignore:lora.targets. all-linear does not reach the experts")
@pytest.mark.parametrize(("name", "what"), CASES)
def test_a_policy_with_adapters_is_what_it_exports(name: str, what: str, tmp_path: Path) -> None:
    folder = start(tmp_path, name)
    model = load_causal_lm(Network(folder, dtype="float64", lora=Lora(r=4, targets=targets_of(folder, what))))
    plain = load_causal_lm(Network(folder, dtype="float64"))
    disturb(model)
    # Norms of transformers round to fp32, so that the last digits of a merged product show.
    assert check_export(model, parent=tmp_path) < 3e-5
    assert check_export(model, adapter=True, parent=tmp_path) < 3e-5
    with pytest.raises(ValueError, match="is not the model of the run: outputs differ by"):
        check_reload(plain, export(model, None, tmp_path / "out"))


@pytest.mark.filterwarnings("ignore:lora.targets. all-linear does not reach the experts")
@pytest.mark.parametrize(("name", "what"), [x for x in CASES if x[0] not in RECURRENT and x[1] != "head"])
def test_a_reward_model_with_adapters_is_what_it_exports(name: str, what: str, tmp_path: Path) -> None:
    folder = start(tmp_path, name)
    model = load_scorer(Network(folder, dtype="float64", lora=Lora(r=4, targets=targets_of(folder, what))))
    disturb(model)
    assert check_export(model, parent=tmp_path) < 1e-5
    assert check_export(model, adapter=True, parent=tmp_path) < 1e-5


@pytest.mark.parametrize("name", ["tied llama", "gemma3_text", "mixtral"])
def test_a_model_trained_whole_is_what_it_exports(name: str, tmp_path: Path) -> None:
    folder = start(tmp_path, name)
    for load in (load_causal_lm, load_scorer):
        model = load(Network(folder, dtype="float64"))
        disturb(model)
        assert check_export(model, parent=tmp_path) < 1e-5


@pytest.mark.parametrize("name", TIED)
def test_a_tied_model_stays_tied_unless_adapters_part_its_weights(name: str, tmp_path: Path) -> None:
    folder = start(tmp_path, name)
    for what, tied in (("layers", True), ("head", False), ("embeddings", False)):
        model = load_causal_lm(Network(folder, lora=Lora(r=2, targets=targets_of(folder, what))))
        disturb(model)
        out = export(model, None, tmp_path / what)
        assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is tied
        head = {w.data_ptr() for w in (m.weight for m in embeddings(AutoModelForCausalLM.from_pretrained(out)))}
        assert len(head) == (1 if tied else 2)
        assert load_causal_lm(Network(str(out)))  # the next stage starts from it


def embeddings(model: Any) -> tuple[Any, Any]:
    return model.get_input_embeddings(), model.get_output_embeddings()


# Kills: names of experts that go nowhere; settings of peft's that JSON cannot hold.
def test_experts_are_adapted_by_name_and_left_out_with_a_word(tmp_path: Path) -> None:
    folder = start(tmp_path, "mixtral")
    with pytest.warns(
        UserWarning, match=r"does not reach the experts \(experts.down_proj, experts.gate_up_proj\), 61%"
    ):
        model = load_causal_lm(Network(folder, lora=Lora(r=2)))
    out = export(model, None, tmp_path / "out", adapter=True)
    assert json.loads((out / CONFIG).read_text())["target_parameters"] is None
    for targets in (["experts"], ["experts.gate_up_proj"], ["gate_up_proj", "q_proj"]):
        model = load_causal_lm(Network(folder, lora=Lora(r=2, targets=targets)))
        disturb(model)
        trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        assert any("experts" in name for name in trained)
        assert any("q_proj" in name for name in trained) is ("q_proj" in targets)
        assert check_export(model, adapter=True, parent=tmp_path) < 1e-5
    with pytest.raises(ValueError, match=r"lora.dropout: 0.1 does not reach experts.down_proj: set it to 0"):
        load_causal_lm(Network(folder, lora=Lora(targets=["experts"], dropout=0.1)))


def test_a_name_that_is_not_in_the_model_is_an_error(tmp_path: Path) -> None:
    folder = start(tmp_path, "llama")
    with pytest.raises(ValueError, match=r"has no layer named 'q_prj', did you mean 'q_proj'\?; it has down_proj, "):
        load_causal_lm(Network(folder, lora=Lora(targets=["v_proj", "q_prj"])))


# Kills: adapters around layers that the model does not call, which train nothing and are merged all the same.
@pytest.mark.parametrize(("name", "layer"), [("mamba", "out_proj"), ("mamba", "dt_proj"), ("jamba", "dt_proj")])
@pytest.mark.filterwarnings("ignore:lora.targets. all-linear does not reach the experts")
def test_a_layer_that_is_read_past_its_adapter_is_left_out(name: str, layer: str, tmp_path: Path) -> None:
    folder = start(tmp_path, name)
    with pytest.raises(ValueError, match=rf"reads the weight of {layer} itself, past any adapter: take the name out"):
        load_causal_lm(Network(folder, lora=Lora(targets=[layer])))
    model = load_causal_lm(Network(folder))
    before = torch.get_rng_state()
    assert layer not in resolve_targets(model, ["all-linear"])[0]
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.filterwarnings("ignore:lora.targets. all-linear does not reach the experts")
@pytest.mark.parametrize(("name", "what"), [("llama", "embeddings"), ("mixtral", "experts")])
def test_a_role_on_the_policys_backbone_scores_as_its_folder(name: str, what: str, tmp_path: Path) -> None:
    folder = start(tmp_path, name)
    targets = targets_of(folder, what)
    reward = load_scorer(Network(folder, lora=Lora(r=2, targets=targets)))
    disturb(reward)
    out = export(reward, None, tmp_path / "reward", adapter=True)
    policy = LanguageModel(load_causal_lm(Network(folder, lora=Lora(r=4, targets=targets))))
    shared = ScalarAdapter(policy, Network(str(out), shared=True), "value", trained=True)
    disturb(policy)
    assert check_export(policy.hf, parent=tmp_path) < 1e-4
    assert check_export(policy.hf, adapter=True, parent=tmp_path) < 1e-5
    assert [n for n, p in policy.hf.named_parameters() if ".value" in n and p.requires_grad]
    assert shared.trained


def test_a_folder_that_is_not_the_model_is_an_error(tmp_path: Path) -> None:
    folder = start(tmp_path, "llama")
    model = load_causal_lm(Network(folder, lora=Lora(r=2)))
    disturb(model)
    out = export(model, None, tmp_path / "out", adapter=True)
    weights = load_file(out / "adapter_model.safetensors")
    save_file({name: 2 * weight for name, weight in weights.items()}, out / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="is not the model of the run: outputs differ by"):
        check_reload(model, out)
    (out / CONFIG).write_text("{}")
    with pytest.raises(ValueError, match="does not load in plain transformers"):
        check_reload(model, out)


# Kills: an adapter compared with the newest revision of its base; the model's own code refused on reload.
def test_the_base_is_that_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = LanguageModel(load_causal_lm(Network(start(tmp_path, "llama"), lora=Lora(r=2)))).hf
    asked: list[dict[str, Any]] = []
    load = AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(
        AutoModelForCausalLM, "from_pretrained", lambda name, **options: asked.append(options) or load(name, **options)
    )
    check_export(model, adapter=True, revision="main", trust_remote_code=True)
    assert (asked[0]["revision"], asked[0]["trust_remote_code"]) == ("main", True)
