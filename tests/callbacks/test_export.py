"""The folder that a fit leaves: plain transformers loads it, and answers with it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lightning import LightningModule, Trainer
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from lit_align import Lora, Network
from lit_align.accelerate import accelerate
from lit_align.callbacks import HFExport

TEMPLATE = (
    "{% for message in messages %}{{ '<' + message['role'] + '>' + message['content'] + '<pad>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


def test_transformers_loads_the_folder(fit: Callable, tmp_path: Path) -> None:
    trainer = fit(HFExport(tmp_path / "model"), data={"chat_template": TEMPLATE})
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    trained = trainer.lightning_module.policy.hf.state_dict()
    assert all(torch.equal(weight, trained[name]) for name, weight in model.state_dict().items())
    # The tokenizer as the data used it, and its end of turn among the stop tokens.
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert tokenizer.chat_template == TEMPLATE
    assert set(trainer.datamodule.stop_ids) <= {*model.generation_config.eos_token_id, tokenizer.pad_token_id}
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "a"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = model.generate(**prompt, max_new_tokens=3, do_sample=False)
    assert answer.shape[1] > prompt["input_ids"].shape[1]
    # Whole or not at all: nothing half-written beside it.
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_adapters_are_merged(fit: Callable, parts: tuple[str, Path], tmp_path: Path) -> None:
    before = AutoModelForCausalLM.from_pretrained(parts[0], dtype=torch.float32)
    trainer = fit(HFExport(tmp_path / "model"), network=Network(parts[0], lora=Lora(r=2)), max_epochs=4)
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert not [name for name in after.state_dict() if "lora" in name]
    assert any(not torch.equal(w, before.state_dict()[name]) for name, w in after.state_dict().items())
    tokens = torch.arange(20, 40)[None]
    merged, adapted = after(tokens).logits, trainer.lightning_module.policy.hf.eval()(tokens).logits
    assert torch.allclose(merged, adapted, atol=1e-5)


@pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)  # of peft, by transformers
# Kills: the adapter merged all the same; its own stop tokens forgotten; names of layers in the order of a set.
def test_an_adapter_alone(fit: Callable, parts: tuple[str, Path], tmp_path: Path) -> None:
    network = Network(parts[0], lora=Lora(r=2, export="adapter"))
    trainer = fit(HFExport(tmp_path / "model"), network=network, max_epochs=4, data={"chat_template": TEMPLATE})
    assert not list(tmp_path.glob("model/model*.safetensors"))
    told = json.loads((tmp_path / "model" / "adapter_config.json").read_text())
    assert told["base_model_name_or_path"] == parts[0]
    assert told["target_modules"] == sorted(told["target_modules"])
    tokens = torch.arange(20, 40)[None]
    hf = trainer.lightning_module.policy.hf
    accelerate(hf, [])  # which round otherwise
    trained = hf.eval()(tokens).logits
    before = AutoModelForCausalLM.from_pretrained(parts[0], dtype=torch.float32)
    assert not torch.allclose(before(tokens).logits, trained)
    by_transformers = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    by_peft = PeftModel.from_pretrained(before, tmp_path / "model")
    by_auto = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    for model in (by_transformers, by_peft, by_auto):
        assert torch.equal(model.eval()(tokens).logits, trained)
    generation = GenerationConfig.from_pretrained(tmp_path / "model")
    assert set(trainer.datamodule.stop_ids) <= {*generation.eos_token_id, trainer.datamodule.tokenizer.pad_token_id}
    assert AutoTokenizer.from_pretrained(tmp_path / "model").chat_template == TEMPLATE


def test_what_is_not_exported(fit: Callable, tmp_path: Path) -> None:
    fit(HFExport(tmp_path / "trial"), fast_dev_run=True)
    assert not (tmp_path / "trial").exists()
    # A module of the user's own, which is no transformers model.
    HFExport(tmp_path / "own").on_fit_end(Trainer(accelerator="cpu", logger=False), LightningModule())
    assert not (tmp_path / "own").exists()
