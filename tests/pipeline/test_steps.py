"""A model to start from where there is none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer

from lit_align import Network, Source
from lit_align.models import load_causal_lm
from lit_align.pipeline.scratch_model import ScratchModel, _texts

WORDS = "the bee sees the sea and the bee sees the tree"


@pytest.fixture
def sources(tmp_path: Path) -> list[Source]:
    demos = [{"instruction": f"{WORDS} {i}", "output": "humming"} for i in range(20)]
    (tmp_path / "demos.json").write_text(json.dumps(demos))
    (tmp_path / "plain.txt").write_text("zigzag " * 20)
    return [Source(str(tmp_path / "demos.json")), Source(str(tmp_path / "plain.txt"))]


def test_a_folder_to_start_from(sources: list[Source], tmp_path: Path) -> None:
    shape = {"hidden_size": 16, "layers": 1, "heads": 2, "intermediate_size": 24, "max_positions": 64}
    figures = ScratchModel(sources, vocab_size=290, init_std=0.5, **shape).run(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out" / "model")
    assert figures == {"vocabulary": 290.0}
    assert len(tokenizer) == 290
    # Trained on the text of every source: what is frequent in it is one token; and any string can be encoded.
    assert len(tokenizer(" the bee", add_special_tokens=False)["input_ids"]) <= 2
    for word in ("humming", "zigzag"):
        assert len(tokenizer(word, add_special_tokens=False)["input_ids"]) < len(word)
    assert tokenizer.decode(tokenizer("zebra £ 🐝", add_special_tokens=False)["input_ids"]) == "zebra £ 🐝"
    assert tokenizer.chat_template
    config = AutoConfig.from_pretrained(tmp_path / "out" / "model")
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (16, 1, 2)
    assert (config.intermediate_size, config.max_position_embeddings, config.vocab_size) == (24, 64, 290)
    assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (
        tokenizer.pad_token_id,
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
    )
    # The weights are drawn when training starts from it.
    torch.manual_seed(0)
    model = load_causal_lm(Network(str(tmp_path / "out" / "model"), weights="random"))
    assert model.get_input_embeddings().weight.std().item() == pytest.approx(0.5, rel=0.1)
    with pytest.raises(ValueError, match="cannot load"):
        load_causal_lm(Network(str(tmp_path / "out" / "model")))


def test_the_same_text_gives_the_same_tokenizer(sources: list[Source], tmp_path: Path) -> None:
    for name in ("one", "two"):
        ScratchModel(sources, vocab_size=300).run(tmp_path / name)
    one, two = ((tmp_path / name / "model" / "tokenizer.json").read_bytes() for name in ("one", "two"))
    assert one == two


def test_every_text_of_a_row_but_roles() -> None:
    row = {
        "prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
        "completions": ["c", "d"],
        "ranks": [0.0, 1.0],
        "finished": None,
        "extra": {"deep": ["e"]},
    }
    assert list(_texts(row)) == ["a", "b", "c", "d", "e"]


def test_rows_that_do_not_fit_are_left_out(tmp_path: Path) -> None:
    """A tokenizer is not a model: five bad rows of a million are no reason to stop."""
    rows = [{"instruction": "bee", "output": "sea"}, {"instruction": 3, "output": None}]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    assert list(ScratchModel([Source(str(tmp_path / "rows.json"))])._strings()) == ["bee", "sea"]
