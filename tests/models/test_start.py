"""A stage starts from the folder of an adapter, as it starts from a model; and from a model with new tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models.test_reload import disturb, embeddings
from peft import PeftModel
from support.tiny import tiny_folder
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_align import SFTModule
from lit_align.models import Lora, Network, ScalarModel, export, load_causal_lm, load_scorer, load_tokenizer
from lit_align.models.lora import adapters_off, has_lora
from lit_align.models.reload import check_export, check_reload
from lit_align.models.roles import CONFIG, WEIGHTS
from lit_align.models.tokens import add_tokens

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

IDS = torch.tensor([[1, 40, 50, 60, 70, 80]])
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"rslora": True, "alpha": 7},
    "dora": {"dora": True},
    "embeddings": {"targets": ["all-linear", "embed_tokens", "lm_head"]},
    "whole": {"modules_to_save": ["embed_tokens", "lm_head"]},
}


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model.eval()(IDS).logits


def trained(place: Path, lora: Lora, load: Any = load_causal_lm, **shape: Any) -> tuple[Any, str, str]:
    """A model with adapters, its folder, and the folder of its base."""
    base = tiny_folder(place / "base", **shape)
    model = load(Network(base, dtype="float64", lora=lora))
    disturb(model)
    return model, str(export(model, load_tokenizer(base), place / "adapter", adapter=True)), base


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("option", OPTIONS)
def test_the_folder_of_an_adapter_stands_for_the_model_with_it(option: str, tied: bool, tmp_path: Path) -> None:
    model, folder, base = trained(tmp_path, Lora(r=4, **OPTIONS[option]), tie_word_embeddings=tied)
    for network in (Network(folder, dtype="float64"), Network(base, dtype="float64", adapter=folder)):
        start = load_causal_lm(network)
        assert not has_lora(start)
        assert all(parameter.requires_grad for parameter in start.parameters())
        assert (logits(start) - logits(model)).abs().max() < 1e-5
    again = load_causal_lm(Network(folder, dtype="float64", lora=Lora(r=2)))
    with adapters_off(again):
        assert torch.equal(logits(again), logits(start))
    disturb(again)
    assert check_export(again, parent=tmp_path) < 1e-5


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("option", OPTIONS)
def test_an_adapter_goes_on_training(option: str, tied: bool, tmp_path: Path) -> None:
    model, folder, base = trained(tmp_path, Lora(r=4, **OPTIONS[option]), tie_word_embeddings=tied)
    again = load_causal_lm(Network(base, dtype="float64", lora=Lora(adapter=folder)))
    assert torch.equal(logits(again), logits(model))
    names = [{name for name, p in m.named_parameters() if p.requires_grad} for m in (model, again)]
    assert names[0] == names[1]
    disturb(again)
    assert check_export(again, parent=tmp_path) < 1e-5
    assert check_export(again, adapter=True, parent=tmp_path) < 1e-5


# Kills: the reference of a run that goes on with an adapter being the model before that adapter.
@pytest.mark.parametrize("network", ["adapter goes on", "folded", "folder alone"])
def test_the_reference_is_what_training_starts_from(network: str, tmp_path: Path) -> None:
    model, folder, base = trained(tmp_path, Lora(r=4))
    options: Any = {"dtype": "float64"}
    told = {
        "adapter goes on": Network(base, lora=Lora(adapter=folder), **options),
        "folded": Network(base, adapter=folder, lora=Lora(r=2), **options),
        "folder alone": Network(folder, **options),
    }
    module = SFTModule(told[network])
    module.configure_model()
    module.load_reference(None)
    assert module.reference_is_below is (network == "folded")
    disturb(module.policy)
    assert (logits(module.policy.hf) - logits(model)).abs().max() > 0.1
    reference = module.policy if module.reference is None else module.reference
    with adapters_off(reference):
        assert (logits(reference.hf) - logits(model)).abs().max() < 1e-5


def test_an_adapter_of_a_reward_model_comes_with_its_head(tmp_path: Path) -> None:
    base = tiny_folder(tmp_path / "base")
    scorer = ScalarModel(load_scorer(Network(base, dtype="float64", lora=Lora(r=4))))
    disturb(scorer)
    scorer.normalize(1.5, 2.0)
    folder = str(export(scorer.hf, None, tmp_path / "reward", adapter=True))
    for network in (Network(folder, dtype="float64"), Network(base, dtype="float64", lora=Lora(adapter=folder))):
        again = ScalarModel(load_scorer(network, need_head=True))
        assert (logits(again.hf) - logits(scorer.hf)).abs().max() < 1e-6
        assert (again.mean.item(), again.std.item()) == (1.5, 2.0)
        assert again.score.weight.requires_grad
    with pytest.raises(ValueError, match="is the adapter of a reward model, not of a language model"):
        load_causal_lm(Network(folder))


def test_an_adapter_of_peft_is_a_start_too(tmp_path: Path) -> None:
    model, folder, base = trained(tmp_path, Lora(r=4))
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64), folder)
    plain.save_pretrained(tmp_path / "theirs")
    assert (
        logits(load_causal_lm(Network(str(tmp_path / "theirs"), dtype="float64"))) - logits(model)
    ).abs().max() < 1e-5
    assert load_tokenizer(str(tmp_path / "theirs")).get_vocab() == load_tokenizer(base).get_vocab()  # of its base


def test_what_is_no_start_is_one_line(tmp_path: Path) -> None:
    _, folder, base = trained(tmp_path, Lora(r=4))
    with pytest.raises(ValueError, match=r"lora.r: the adapter in .* goes on as it was made; take the option out"):
        load_causal_lm(Network(base, lora=Lora(r=4, adapter=folder)))
    with pytest.raises(ValueError, match=r"lora.adapter needs a whole model below, and .* is an adapter"):
        Network(folder, lora=Lora(adapter=folder))
    with pytest.raises(ValueError, match=r"lora.export: adapter needs a whole model below"):
        Network(folder, lora=Lora(export="adapter"))
    other = tiny_folder(tmp_path / "other", seed=1)
    with pytest.raises(ValueError, match=r"is one of .*base', and the model is .*other': an adapter needs the weights"):
        load_causal_lm(Network(other, dtype="float64", adapter=folder))
    narrow = tiny_folder(tmp_path / "narrow", hidden_size=16)
    with pytest.raises(ValueError, match=r"do not belong together|is one of"):
        load_causal_lm(Network(narrow, adapter=folder))
    settings = json.loads(Path(folder, CONFIG).read_text())
    for change, message in (
        ({"peft_type": "IA3"}, "holds an adapter of type IA3: only LORA is supported"),
        ({"init_lora_weights": "pissa"}, "was started by 'pissa', which changes the model below it"),
        (
            {"base_model_name_or_path": None},
            "does not tell which model it was trained on: give that model",
        ),
    ):
        Path(folder, CONFIG).write_text(json.dumps(settings | change))
        with pytest.raises(ValueError, match=message):
            load_causal_lm(Network(folder, dtype="float64"))
    Path(folder, CONFIG).write_text(json.dumps(settings))
    Path(folder, WEIGHTS).unlink()
    with pytest.raises(ValueError, match=r"adapter_model.safetensors is not in the folder"):
        load_causal_lm(Network(folder))


TOKENS = ["<|im_start|>", "<|im_end|>"]


def learnt(tokenizer: Any) -> list[int]:
    return [tokenizer.convert_tokens_to_ids(token) for token in TOKENS]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("lora", [None, Lora(r=2), Lora(r=2, modules_to_save=["mlp"])])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_new_tokens_get_rows_that_are_trained_and_exported(
    architecture: str, lora: Lora | None, tied: bool, tmp_path: Path
) -> None:
    folder = tiny_folder(tmp_path / "base", architecture, tie_word_embeddings=tied)
    before = load_causal_lm(Network(folder, dtype="float64"))
    model: Any = load_causal_lm(Network(folder, dtype="float64", lora=lora, new_tokens=TOKENS))
    assert torch.allclose(logits(model)[..., :-2], logits(before), atol=1e-9)
    for new, old in zip(embeddings(model), embeddings(before), strict=True):
        assert new.weight.shape == (265, 32)
        assert new.weight.requires_grad
        assert torch.allclose(new.weight[263:], old.weight.mean(0).expand(2, -1))
    assert (embeddings(model)[0].weight is embeddings(model)[1].weight) is tied
    again = load_causal_lm(Network(folder, dtype="float64", lora=lora, new_tokens=TOKENS))  # as a resumed run does
    assert torch.equal(logits(again), logits(model))
    disturb(model)
    tokenizer = load_tokenizer(folder)
    assert add_tokens(tokenizer, TOKENS) == [263, 264] == learnt(tokenizer)
    out = export(model, tokenizer, tmp_path / "out")
    assert check_reload(model, out) < 1e-5
    assert learnt(AutoTokenizer.from_pretrained(out)) == [263, 264]
    assert load_causal_lm(Network(str(out), new_tokens=TOKENS)).config.vocab_size == 265  # known by now
    if lora is not None:
        alone = export(model, tokenizer, tmp_path / "alone", adapter=True)
        assert check_reload(model, alone) < 1e-5
        assert (logits(load_causal_lm(Network(str(alone), dtype="float64"))) - logits(model)).abs().max() < 1e-5
        on = load_causal_lm(Network(folder, dtype="float64", lora=Lora(adapter=str(alone))))
        assert torch.equal(logits(on), logits(model))


def test_new_tokens_in_rows_that_a_model_has_to_spare(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "base", vocab_size=272)
    model = load_causal_lm(Network(folder, lora=Lora(r=2), new_tokens=TOKENS))
    disturb(model)
    weight: Any = model.get_input_embeddings().weight  # type: ignore[union-attr]
    assert weight.shape[0] == 272
    assert check_export(model, parent=tmp_path) < 1e-4
    assert check_export(model, adapter=True, parent=tmp_path) < 1e-5


def test_a_reward_model_with_new_tokens(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "base")
    model = load_scorer(Network(folder, dtype="float64", lora=Lora(r=2), new_tokens=TOKENS))
    disturb(model)
    assert check_export(model, parent=tmp_path) < 1e-5
    assert check_export(model, adapter=True, parent=tmp_path) < 1e-5


def test_new_tokens_are_not_an_update_of_low_rank(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "base")
    with pytest.raises(ValueError, match=r"embed_tokens has rows for new tokens and is trained whole: take"):
        load_causal_lm(Network(folder, lora=Lora(targets=["embed_tokens"]), new_tokens=TOKENS))
    _, adapter, base = trained(tmp_path / "adapter", Lora(r=2))
    with pytest.raises(ValueError, match="trains no embeddings: fold it into the model"):
        load_causal_lm(Network(base, lora=Lora(adapter=adapter), new_tokens=TOKENS))
