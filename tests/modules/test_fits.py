"""Data and model are compared before training: positions, tokens, whose tokenizer it is."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
from lightning import Trainer
from support.tiny import tiny_folder

from lit_align import (
    DPOModule,
    InstructionDataModule,
    Network,
    PPOModule,
    PreferenceDataModule,
    PromptDataModule,
    RegexReward,
    RewardModule,
    Sampling,
    SFTModule,
    Source,
)
from lit_align.models.scratch import bpe_tokenizer

LONG = "a b c " * 40


@pytest.fixture
def rows(tmp_path: Path) -> Any:
    def written(name: str, *rows: dict) -> list[Source]:
        (tmp_path / name).write_text(json.dumps(list(rows)))
        return [Source(tmp_path / name)]

    return written


def fit(module: Any, data: Any, verb: str = "fit") -> None:
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    getattr(Trainer(max_steps=4, accelerator="cpu", **quiet), verb)(module, data)


OPTIONS = {"val_fraction": 0.0, "cache_dir": "none", "batch_size": 1}


@pytest.mark.parametrize("kind", ["sft", "dpo", "reward"])
@pytest.mark.parametrize("architecture", ["gpt2", "opt"])
def test_rows_longer_than_the_positions_are_one_line(rows, tmp_path: Path, kind: str, architecture: str) -> None:
    shape = {"n_positions": 64} if architecture == "gpt2" else {"max_position_embeddings": 64, "ffn_dim": 48}
    shape |= {"word_embed_proj_dim": 32} if architecture == "opt" else {}
    folder = tiny_folder(tmp_path / "model", architecture, **shape)
    if kind == "sft":
        data = InstructionDataModule(folder, rows("long.json", {"instruction": "Hi", "output": LONG}), **OPTIONS)
    else:
        pair = {"prompt": "Hi", "chosen": LONG, "rejected": "No"}
        data = PreferenceDataModule(folder, rows("long.json", pair), **OPTIONS)
    module = {"sft": SFTModule, "dpo": DPOModule, "reward": RewardModule}[kind](Network(folder))
    says = r"long.json: the longest sequence has 2\d\d tokens; the model has 64 positions: "
    with pytest.raises(ValueError, match=says):
        fit(module, data)


def test_validation_alone_and_answers_that_are_sampled(rows, tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "model", "gpt2", n_positions=64)
    demonstration = rows("long.json", {"instruction": "Hi", "output": LONG})
    data = InstructionDataModule(folder, demonstration, val=demonstration, **OPTIONS)
    with pytest.raises(ValueError, match=r"the model has 64 positions: set data\.max_length to 64 or less"):
        fit(SFTModule(Network(folder)), data, "validate")
    prompts = PromptDataModule(folder, rows("prompts.json", {"prompt": "Hi"}), **OPTIONS)
    module = PPOModule(Network(folder), RegexReward("x"), sampling=Sampling(max_new_tokens=60))
    with pytest.raises(ValueError, match=r"answers up to model.sampling.max_new_tokens \(60\) more; the model has 64"):
        fit(module, prompts)


def test_a_model_that_rotates_positions_may_go_beyond_and_says_so(rows, tmp_path: Path, caplog) -> None:
    folder = tiny_folder(tmp_path / "model", "llama", max_position_embeddings=64)
    data = InstructionDataModule(folder, rows("long.json", {"instruction": "Hi", "output": LONG}), **OPTIONS)
    with caplog.at_level(logging.INFO):
        fit(SFTModule(Network(folder)), data)
    assert "the model has 64 positions, and was not trained beyond them: set data.max_length to 64" in caplog.text


def test_tokens_beyond_the_embedding(rows, tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "model", "llama")
    larger = bpe_tokenizer([], 256 + 7)
    larger.add_tokens(["wonderful"])
    larger.save_pretrained(tmp_path / "larger")
    short = rows("x.json", {"instruction": "Hi", "output": "Yo"})
    fitting = InstructionDataModule(tmp_path / "larger", short, **OPTIONS)
    fit(SFTModule(Network(folder)), fitting)
    source = rows("y.json", {"instruction": "Hi", "output": "wonderful"})
    beyond = InstructionDataModule(tmp_path / "larger", source, **OPTIONS)
    says = r"y.json: token 263 \('wonderful'\) is none of the model's: .* 264 tokens, .* 263 rows"
    with pytest.raises(ValueError, match=says):
        fit(SFTModule(Network(folder)), beyond)


def test_the_tokenizer_of_another_model(rows, tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "model", "llama")
    vocabulary = bpe_tokenizer([], 256 + 7).get_vocab()
    shutil.copytree(folder, tmp_path / "other")
    file = tmp_path / "other" / "tokenizer.json"
    told = json.loads(file.read_text())
    bytes_ = [name for name, token in vocabulary.items() if token >= 7]
    told["model"]["vocab"] |= {name: 7 + (vocabulary[name] - 7 + 1) % len(bytes_) for name in bytes_}
    file.write_text(json.dumps(told))
    data = InstructionDataModule(tmp_path / "other", rows("x.json", {"instruction": "Hi", "output": "Yo"}), **OPTIONS)
    with pytest.raises(
        ValueError, match=r"data.tokenizer \(.*other\) is another model's: 256 of 263 tokens of .*model"
    ):
        fit(SFTModule(Network(folder)), data)
