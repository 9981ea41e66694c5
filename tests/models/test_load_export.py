"""Loading says what is missing; an exported folder is what plain transformers loads, to the last digit."""

from __future__ import annotations

import json
import os
import stat
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny import ARCHITECTURES, tiny_folder
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from lit_align.accelerate import accelerate
from lit_align.models import (
    LanguageModel,
    Lora,
    Network,
    ScalarModel,
    export,
    load_causal_lm,
    load_scorer,
    load_tokenizer,
)
from lit_align.models.load import draw_head
from lit_align.models.lora import adapters_off, has_lora

IDS = torch.tensor([[1, 40, 50, 60, 70, 80]])


def disturb(module: nn.Module) -> None:
    """Give every trainable weight something to show."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))


@pytest.mark.parametrize("lora", [None, Lora(r=4)], ids=["full", "lora"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_exported_language_model_gives_equal_logits(architecture: str, lora: Lora | None, tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "start", architecture)
    policy = LanguageModel(load_causal_lm(Network(folder, lora=lora)))
    disturb(policy)
    out = export(policy.hf, load_tokenizer(folder), tmp_path / "out")
    plain = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    with torch.no_grad():
        expected, got = policy.hf.eval()(IDS).logits, plain.eval()(IDS).logits
        # Adapters are merged: one matrix product instead of two sums. Layers of transformers round otherwise.
        assert (got - expected).abs().max() < 1e-5
        if lora is None:
            accelerate(plain)
            assert torch.equal(plain(IDS).logits, expected)
    assert not has_lora(plain)
    assert AutoTokenizer.from_pretrained(out).chat_template == load_tokenizer(folder).chat_template


@pytest.mark.parametrize("lora", [None, Lora(r=4)], ids=["full", "lora"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_exported_reward_model_is_a_sequence_classifier(architecture: str, lora: Lora | None, tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "start", architecture)
    scorer = ScalarModel(load_scorer(Network(folder, lora=lora)))
    disturb(scorer)
    scorer.normalize(1.5, 2.0)
    out = export(scorer.hf, load_tokenizer(folder), tmp_path / "out")
    plain = AutoModelForSequenceClassification.from_pretrained(out, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = scorer.hf.eval()(IDS).logits
        assert (plain(IDS).logits - expected).abs().max() < 1e-5
    again = ScalarModel(load_scorer(Network(str(out)), need_head=True))
    assert (again.mean.item(), again.std.item()) == (1.5, 2.0)


def test_lora_trains_adapters_only_and_switches_off(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "start")
    policy = LanguageModel(load_causal_lm(Network(folder, lora=Lora(r=4))))
    trained = [name for name, p in policy.named_parameters() if p.requires_grad]
    assert trained
    assert all(".lora_" in name for name in trained)
    before = policy.hf(IDS).logits
    disturb(policy)
    assert not torch.allclose(policy.hf(IDS).logits, before)
    with adapters_off(policy), torch.no_grad():
        assert torch.equal(policy.hf(IDS).logits, before)
    assert [name for name, p in policy.named_parameters() if p.requires_grad] == trained
    scorer = ScalarModel(load_scorer(Network(folder, lora=Lora(r=4))))
    trained = {
        name.split(".")[-3 if "lora" in name else -2] for name, p in scorer.named_parameters() if p.requires_grad
    }
    assert trained >= {"score"}


def test_weights_are_fp32_in_training_mode_without_dropout(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "start", "gpt2", resid_pdrop=0.3, embd_pdrop=0.3, attn_pdrop=0.3)
    model = load_causal_lm(Network(folder))
    assert model.dtype == torch.float32
    assert model.training
    assert {m.p for m in model.modules() if isinstance(m, nn.Dropout)} == {0.0}
    kept = load_causal_lm(Network(folder, dropout=None))
    assert 0.3 in {m.p for m in kept.modules() if isinstance(m, nn.Dropout)}


def test_random_weights_need_only_a_configuration(tmp_path: Path) -> None:
    folder = Path(tiny_folder(tmp_path / "start"))
    (folder / "model.safetensors").unlink()
    torch.manual_seed(0)
    first = load_causal_lm(Network(str(folder), weights="random"))
    torch.manual_seed(0)
    second = load_causal_lm(Network(str(folder), weights="random"))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    with pytest.raises(ValueError, match="cannot load"):
        load_causal_lm(Network(str(folder)))


def test_missing_weights_are_an_error_and_not_random(tmp_path: Path) -> None:
    folder = Path(tiny_folder(tmp_path / "start"))
    config = json.loads((folder / "config.json").read_text())
    config["num_hidden_layers"] = 3
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"lacks \d+ of the weights of LlamaForCausalLM"):
        load_causal_lm(Network(str(folder)))


def test_a_reward_is_never_computed_by_a_random_head(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "start")
    with pytest.raises(ValueError, match="holds no trained scalar head"):
        load_scorer(Network(folder), need_head=True)


# Kills: a head drawn in the weights' precision, which differs between versions of torch; a variance of another width.
def test_a_new_scalar_head_is_the_same_in_every_precision() -> None:
    heads = []
    for dtype in (torch.float32, torch.bfloat16):
        heads.append(torch.nn.Linear(4_095, 1, bias=False, dtype=dtype))
        torch.manual_seed(0)
        draw_head(heads[-1])
    assert torch.equal(heads[0].weight.bfloat16(), heads[1].weight)
    assert heads[0].weight.std().item() == pytest.approx(1 / 64, rel=0.05)


def test_an_unknown_name_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot load .*nowhere") as caught:
        load_causal_lm(Network(str(tmp_path / "nowhere")))
    assert "\n" not in str(caught.value)


def test_where_an_adapter_alone_will_not_do(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "start")
    adapter = Lora(r=4, export="adapter")
    with pytest.raises(ValueError, match=r"an adapter is nothing without the random weights"):
        Network(folder, weights="random", lora=adapter)
    out = export(load_causal_lm(Network(folder, lora=adapter)), None, tmp_path / "out", adapter=True)
    Path(folder).rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"out' is an adapter of .*start', which cannot be loaded .*network.adapter"):
        load_causal_lm(Network(str(out)))


def test_padding_token_is_no_stop_token(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "start")
    policy, tokenizer = load_causal_lm(Network(folder)), load_tokenizer(folder)
    policy.generation_config.eos_token_id = [2, 0]
    out = export(policy, tokenizer, tmp_path / "out", stop_ids=[9])
    saved = json.loads((out / "generation_config.json").read_text())
    assert saved["eos_token_id"] == [2, 9]
    assert saved["pad_token_id"] == 0


def test_export_replaces_an_earlier_one_whole(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "start")
    model = load_causal_lm(Network(folder))
    out = export(model, None, tmp_path / "out")
    (out / "stale").write_text("")
    export(model, None, out)
    assert not (out / "stale").exists()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


# Kills: files that only their owner may read; a name given before the content is on disk.
@pytest.mark.parametrize("mask", [0o022, 0o027])
def test_an_export_is_on_disk_and_has_the_permissions_of_any_file(
    tmp_path: Path, mask: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_causal_lm(Network(tiny_folder(tmp_path / "start")))
    synced: set[str] = set()
    fsync, rename = os.fsync, Path.rename

    def renamed(path: Path, target: Path) -> Path:
        if target.name == "out":
            assert synced >= {str(file) for file in path.iterdir()} | {str(path)}
        return rename(path, target)

    def noted(descriptor: int) -> None:
        synced.add(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(Path, "rename", renamed)
    before = os.umask(mask)
    try:
        out = export(model, None, tmp_path / "out", card="---\ntags:\n- lit_align\n---\n")
    finally:
        os.umask(before)
    assert {stat.S_IMODE(file.stat().st_mode) for file in out.iterdir()} == {0o666 & ~mask}
    assert str(tmp_path) in synced


def test_an_interrupted_export_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_causal_lm(Network(tiny_folder(tmp_path / "start")))

    def interrupted(*call: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["lit_align.models.export"], "write_seal", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export(model, None, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["start"]
