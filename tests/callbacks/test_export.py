"""The folder that a fit leaves: plain transformers loads it, and answers with it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from lightning import LightningModule, Trainer
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_align import Lora, Network
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


def test_what_is_not_exported(fit: Callable, tmp_path: Path) -> None:
    fit(HFExport(tmp_path / "trial"), fast_dev_run=True)
    assert not (tmp_path / "trial").exists()
    # A module of the user's own, which is no transformers model.
    HFExport(tmp_path / "own").on_fit_end(Trainer(accelerator="cpu", logger=False), LightningModule())
    assert not (tmp_path / "own").exists()
