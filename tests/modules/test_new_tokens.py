"""Tokens that are new to a model: in the data, in training, in the exported folder, and after a resume."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from support.runs import write_rows
from support.tiny import VOCABULARY, tiny_folder
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_align import InstructionDataModule, Lora, Network, SFTModule, Source
from lit_align.cli.entry import main
from lit_align.models.scratch import bpe_tokenizer

TOKENS = ["<|im_start|>", "<|im_end|>"]


def written(place: Path, steps: int, lora: dict[str, Any] | None, network: dict[str, Any] | None = None) -> Path:
    told = {"name": str(place / "model"), "new_tokens": TOKENS, "lora": lora, **(network or {})}
    content = {
        "seed_everything": 1,
        "model": {"class_path": "lit_align.SFTModule", "init_args": {"network": told}},
        "data": {
            "class_path": "lit_align.InstructionDataModule",
            "init_args": {
                "tokenizer": str(place / "model"),
                "chat_template": "chatml",
                "train": [{"path": str(place / "demos.json")}],
                "batch_size": 2,
                "cache_dir": "none",
            },
        },
        "trainer": {"max_steps": steps, "accelerator": "cpu", "logger": False, "enable_progress_bar": False},
    }
    path = place / "run.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


# Kills: tokens that the data writes as text; rows that are not trained, not exported, or others after a resume.
@pytest.mark.parametrize("lora", [None, {"r": 2}, {"r": 2, "export": "adapter"}])
def test_a_run_on_new_tokens(lora: dict[str, Any] | None, tmp_path: Path) -> None:
    write_rows(tmp_path)
    tiny_folder(tmp_path / "model", tie_word_embeddings=True)
    main(["fit", "-c", str(written(tmp_path, 2, lora)), "--out", str(tmp_path / "out")])
    folder = tmp_path / "out" / "model"
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    ids = [tokenizer.convert_tokens_to_ids(token) for token in TOKENS]
    assert ids == [VOCABULARY, VOCABULARY + 1]
    text = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert tokenizer(text, add_special_tokens=False)["input_ids"].count(ids[0]) == text.count(TOKENS[0]) > 0
    stops = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    assert ids[1] in stops
    if lora is None or "export" not in lora:
        rows: Any = AutoModelForCausalLM.from_pretrained(folder).get_input_embeddings()
        assert rows.weight.shape[0] == VOCABULARY + 2
        assert not torch.equal(rows.weight[ids[0]], rows.weight[ids[1]])  # they start alike
    # The next stage starts from it, without the option.
    main(["fit", "-c", str(written(tmp_path, 1, None, {"name": str(folder), "new_tokens": []})),
          "--data.tokenizer", str(folder), "--out", str(tmp_path / "next")])  # fmt: skip
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "next" / "model").config.vocab_size == VOCABULARY + 2


def test_a_vocabulary_that_gives_them_other_ids_is_refused(tmp_path: Path) -> None:
    write_rows(tmp_path)
    folder = tiny_folder(tmp_path / "model")
    bpe_tokenizer([], VOCABULARY).save_pretrained(tmp_path / "other")
    other: Any = AutoTokenizer.from_pretrained(tmp_path / "other")
    other.add_tokens(["<more>"], special_tokens=True)
    other.save_pretrained(tmp_path / "other")
    module = SFTModule(Network(folder, new_tokens=TOKENS, lora=Lora(r=2)))
    data = InstructionDataModule(str(tmp_path / "other"), [Source(str(tmp_path / "demos.json"))], cache_dir="none")
    data.new_tokens = TOKENS

    class Held:
        datamodule, lightning_module = data, module

    module._trainer = Held()  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"'<\|im_start\|>' is 263 in the model's vocabulary and 264 in that of"):
        module.configure_model()
