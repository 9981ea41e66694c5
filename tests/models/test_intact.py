"""A damaged model folder ends in one line that names the file and the way out."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tiny import tiny_folder
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from lit_align.models import Lora, Network, export, load_causal_lm, load_scorer, load_tokenizer
from lit_align.models.intact import check_values
from lit_align.models.language import LanguageModel
from lit_align.models.roles import load_role

Folder = Callable[..., Path]


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    """A model of two layers, with some of its config.json changed."""

    def written(architecture: str = "llama", **changes: Any) -> Path:
        place = Path(tiny_folder(tmp_path / architecture, architecture))
        config = json.loads((place / "config.json").read_text())
        (place / "config.json").write_text(json.dumps(config | changes))
        return place

    return written


def damage(file: Path, how: str) -> None:
    content = file.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    file.write_bytes(
        {
            "cut": content[:-1000],
            "cut in its header": content[: header - 10],
            "empty": b"",
            "header too large": b"\xff" * 8 + content[8:],
            "header of noise": content[:8] + b"\xfe" * (header - 8) + content[header:],
            "zeros": content[:header] + bytes(len(content) - header),
        }[how]
    )


def refused(pattern: str, load: Callable[[], Any]) -> None:
    with pytest.raises(ValueError, match=pattern) as caught:
        load()
    assert "\n" not in str(caught.value)


DAMAGED = {
    "cut": "model.safetensors is damaged: it has .* bytes, and its header asks for",
    "cut in its header": "model.safetensors is damaged: its header claims",
    "empty": "model.safetensors is damaged: it is empty",
    "header too large": "model.safetensors is damaged: its header claims",
    "header of noise": "model.safetensors is damaged: its header cannot be read",
    "zeros": "llama: .* holds only zeros",
}


# Kills: a traceback of safetensors; zeros that are trained on.
@pytest.mark.parametrize("load", [load_causal_lm, load_scorer])
@pytest.mark.parametrize("how", DAMAGED)
def test_a_damaged_weight_file(folder: Folder, how: str, load: Callable) -> None:
    place = folder()
    damage(place / "model.safetensors", how)
    refused(DAMAGED[how], lambda: load(Network(str(place))))


# Kills: "look at the above report", which is hidden; a model of fewer layers that is trained.
@pytest.mark.parametrize(
    ("architecture", "changes", "says"),
    [
        ("llama", {"vocab_size": 300}, r"config.json \(vocab_size: 300\) does not fit .* 263 x 32 in the file"),
        ("gpt2", {"n_embd": 64}, r"n_embd: 64.* does not fit the weights"),
        ("llama", {"hidden_size": 64, "head_dim": 16}, r"config.json \(.*hidden_size: 64\) does not fit the weights"),
        ("qwen3", {"num_attention_heads": 8}, r"o_proj.weight has shape 32 x 32 in the file, and 32 x 64"),
        ("llama", {"num_attention_heads": 5}, r"cannot load .*not a multiple of the number of attention heads"),
        ("llama", {"hidden_size": "wide"}, r"cannot load .*'hidden_size' expected int, got str"),
        ("llama", {"num_hidden_layers": 1}, r"9 weights without a place .* model.layers.1.*num_hidden_layers: 1"),
        ("gpt2", {"n_layer": 1}, r"1\d weights without a place in GPT2LMHeadModel"),
        ("llama", {"num_hidden_layers": 3}, r"lacks 9 of the weights of LlamaForCausalLM.*do not belong together"),
    ],
)
def test_a_configuration_of_another_model(
    folder: Folder, architecture: str, changes: dict[str, Any], says: str
) -> None:
    place = folder(architecture, **changes)
    refused(says, lambda: load_causal_lm(Network(str(place))))


@pytest.mark.parametrize("content", ["{bad", "", "[1]", '{"a": 1'])
def test_a_configuration_that_is_none(folder: Folder, content: str) -> None:
    place = folder()
    (place / "config.json").write_text(content)
    refused(r"config.json (is not valid JSON|holds list)", lambda: load_causal_lm(Network(str(place))))


def test_weights_of_another_architecture(folder: Folder) -> None:
    place = folder()
    shutil.copy(folder("gpt2") / "model.safetensors", place)
    refused("lacks 21 of the weights of LlamaForCausalLM", lambda: load_causal_lm(Network(str(place))))


# Kills: a KeyError; a shard that lies in the place of another.
def test_shards(folder: Folder, tmp_path: Path) -> None:
    place = tmp_path / "shards"
    AutoModelForCausalLM.from_pretrained(folder()).save_pretrained(place, max_shard_size="20KB")
    load_causal_lm(Network(str(place)))
    first, second = sorted(place.glob("*.safetensors"))[:2]
    one, index = first.read_bytes(), place / "model.safetensors.index.json"
    shutil.copy(second, first)
    refused(rf"{first.name} lacks 1 of the weights that {index.name}", lambda: load_causal_lm(Network(str(place))))
    first.write_bytes(one[:-5])
    refused(rf"{first.name} is damaged", lambda: load_causal_lm(Network(str(place))))
    first.unlink()
    refused(rf"{index.name} names {first.name}, which is not", lambda: load_causal_lm(Network(str(place))))
    index.write_text("{}")
    refused(rf"{index.name} has no weight_map", lambda: load_causal_lm(Network(str(place))))


# Kills: scores of another kind of head, or an error that names no way out.
def test_a_classifier_of_two_labels_is_no_reward_model(folder: Folder, tmp_path: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(folder(), num_labels=2)
    model.save_pretrained(tmp_path / "two")
    for need in (True, False):
        refused(
            r"two' is a classifier with 2 labels \(score.weight\), and a reward or value model has one",
            lambda need=need: load_scorer(Network(str(tmp_path / "two")), need_head=need),
        )


def test_a_reward_model_is_no_language_model(folder: Folder, tmp_path: Path) -> None:
    export(load_scorer(Network(str(folder()))), None, tmp_path / "reward")
    refused("holds a classifier or a reward model", lambda: load_causal_lm(Network(str(tmp_path / "reward"))))
    load_scorer(Network(str(tmp_path / "reward")), need_head=True)


def spoil(file: Path, key: str, value: float) -> None:
    weights = load_file(file)
    weights[key].view(-1)[3:5] = value
    save_file(weights, file, metadata={"format": "pt"})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("load", [load_causal_lm, load_scorer])
def test_weights_that_are_no_numbers(folder: Folder, value: float, load: Callable) -> None:
    place = folder()
    spoil(place / "model.safetensors", "model.layers.1.mlp.up_proj.weight", value)
    refused(
        r"llama: some weights are not finite: 2 of 1,536 in model.layers.1.mlp.up_proj.weight",
        lambda: load(Network(str(place))),
    )


def test_what_is_zero_by_design() -> None:
    some, none = torch.ones(2, 2), torch.zeros(2, 2)
    check_values("m", {"embed": some, "l.0.out": none, "l.1.out": none, "bias": torch.zeros(2), "l.0.norm": none[0]})
    for wrong in ({"embed": none}, {"embed": some, "l.0.up": some, "l.1.up": none}):
        with pytest.raises(ValueError, match=r"(embed|l.1.up) holds only zeros"):
            check_values("m", wrong)
    check_values("m", {"embed": some, "lm_head.weight": none})  # every token equally probable
    check_values("m", {"large": torch.full((2, 2), 3e38)})  # whose sum overflows in fp32


# Kills: block expansion refused; a layer of which one output alone is lost taken for block expansion.
def test_layers_that_block_expansion_adds() -> None:
    names = ("self_attn.q_proj.weight", "self_attn.o_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight")
    outputs = ("o_proj", "down_proj")

    def layers(*zero: str) -> dict[str, torch.Tensor]:
        weights = {f"model.layers.{i}.{name}": torch.ones(2, 2) for i in range(3) for name in names}
        for name in names:
            if any(part in name for part in zero):
                weights[f"model.layers.1.{name}"] = torch.zeros(2, 2)
        return weights

    check_values("m", layers(*outputs))
    for damaged in (("o_proj",), ("up_proj",), (*outputs, "q_proj")):
        with pytest.raises(ValueError, match=r"layers.1.* holds only zeros"):
            check_values("m", layers(*damaged))


# Kills: a buffer of older versions, or a head that ties, taken for a weight too many.
def test_what_changes_nothing_may_be_too_much(folder: Folder) -> None:
    place = folder()
    weights = load_file(place / "model.safetensors")
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    weights["model.layers.0.self_attn.causal_mask"] = torch.ones(1, 1, 4, 4)
    save_file(weights, place / "model.safetensors", metadata={"format": "pt"})
    load_causal_lm(Network(str(place)))
    load_scorer(Network(str(place)))
    load_scorer(Network(str(folder("gpt_neox"))))


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("tokenizer.json", None, "has no tokenizer"),
        ("tokenizer.json", "{", "cannot load the tokenizer of"),
        ("tokenizer.json", '{"model": 3}', "cannot load the tokenizer of"),
        ("tokenizer_config.json", "{", "tokenizer_config.json is not valid JSON"),
    ],
)
def test_a_tokenizer(folder: Folder, file: str, content: str | None, says: str) -> None:
    place = folder()
    if content is None:
        (place / file).unlink()
    else:
        (place / file).write_text(content)
    refused(says, lambda: load_tokenizer(str(place)))


@pytest.fixture
def adapter(folder: Folder, tmp_path: Path) -> tuple[Path, Path]:
    """A model, and a reward adapter on it."""
    place = folder()
    network = Network(str(place), lora=Lora(r=2, export="adapter"))
    torch.manual_seed(0)
    return place, export(load_scorer(network), None, tmp_path / "adapter", adapter=True)


@pytest.mark.parametrize("how", [how for how in DAMAGED if how != "zeros"])
def test_a_damaged_adapter(adapter: tuple[Path, Path], how: str) -> None:
    place, reward = adapter
    damage(reward / "adapter_model.safetensors", how)
    refused(
        DAMAGED[how].replace("model.safetensors", "adapter_model.safetensors"),
        lambda: load_adapter(place, reward),
    )


def load_adapter(place: Path, reward: Path) -> Any:
    policy = LanguageModel(load_causal_lm(Network(str(place), lora=Lora(r=2))))
    return load_role(Network(str(reward), shared=True), policy, "reward")


def test_an_adapter_with_wrong_values_or_files(adapter: tuple[Path, Path]) -> None:
    place, reward = adapter
    load_adapter(place, reward)
    config, file = reward / "adapter_config.json", reward / "adapter_model.safetensors"
    told, kept = config.read_text(), file.read_bytes()
    config.write_text(json.dumps(json.loads(told) | {"r": 4}))
    refused("adapter_config.json and adapter_model.safetensors do not belong", lambda: load_adapter(place, reward))
    config.write_text("{")
    refused("adapter_config.json is not valid JSON", lambda: load_adapter(place, reward))
    config.write_text(told)
    names = list(load_file(file))
    spoil_adapter(file, next(name for name in names if "lora_B" in name), float("nan"))
    refused("some weights are not finite", lambda: load_adapter(place, reward))
    file.write_bytes(kept)
    damage(file, "zeros")
    refused("holds only zeros", lambda: load_adapter(place, reward))
    file.unlink()
    refused("adapter_model.safetensors is not in the folder", lambda: load_adapter(place, reward))


def spoil_adapter(file: Path, key: str, value: float) -> None:
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    weights = load_file(file)
    weights[key].view(-1)[3:5] = value
    save_file(weights, file, metadata=metadata)


# Kills: a model of the sizes that a damaged config.json gives, which takes all memory before it is compared.
@pytest.mark.parametrize("name", ["hidden_size", "vocab_size"])
def test_sizes_far_beyond_the_weights(folder: Folder, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    place = folder()
    config = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps({**config, name: 10**7}))
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("it was built"))
    refused(rf"config.json: {name}: 10,000,000 does not fit the weights", lambda: load_causal_lm(Network(str(place))))
