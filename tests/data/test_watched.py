"""Columns that nobody reads are named once; images are refused; stages that speak differently are told apart."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest
from data.chats import chatml, plain

from lit_align.data.instruction import InstructionDataModule
from lit_align.data.preference import PreferenceDataModule
from lit_align.data.prompt import PromptDataModule
from lit_align.data.prompt_format import differs_from_before
from lit_align.data.rows import BadRow
from lit_align.data.source import Source

USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}


@pytest.fixture
def said(write, tmp_path, caplog):
    """What the log says of the columns of some rows."""

    def logged(rows: list[dict], kind: Any = InstructionDataModule, **source: Any) -> str:
        chatml().save_pretrained(tmp_path / "model")
        for _ in range(2):  # tokenised, and out of the cache
            caplog.clear()
            made = kind(str(tmp_path / "model"), [Source(write("rows.jsonl", rows), **source)], val_fraction=0.0)
            with caplog.at_level(logging.INFO):
                made.setup("fit")
        return " ".join(r.message for r in caplog.records if "columns" in r.message).partition("not used: ")[2]

    return logged


def test_columns_that_are_not_used_are_named_once(said) -> None:
    row = {"instruction": "Hi", "input": "x", "output": "Yo", "context": "So it is.", "id": 3, "null": None}
    assert said([row] * 3) == "context, id"
    assert said([{"question": "Hi", "output": "Yo", "topic": "a"}], columns={"instruction": "question"}) == "topic"
    turns = [{**USER, "id": 1}, {**ANSWER, "rating": 5, "weight": 1}]
    assert said([{"messages": turns, "source": "x"}]) == "messages[].id, messages[].rating, source"
    assert said([{"messages": [USER, ANSWER], "system": "Be brief."}]) == ""
    assert (
        said([{"prompt": "Hi", "chosen": "a", "rejected": "b", "history": [], "kind": 1}], PreferenceDataModule)
        == "kind"
    )
    # A reward may look at any column of a prompt's row.
    assert said([{"prompt": "Hi", "level": 3}], PromptDataModule) == ""


# Kills: a user's turn that asks to be trained on, dropped without a word.
@pytest.mark.parametrize("mark", [{"weight": 1}, {"train": True}])
def test_turns_of_others_that_ask_for_training_are_counted(write, tmp_path, mark: dict) -> None:
    plain().save_pretrained(tmp_path / "model")
    rows = [{"messages": [{**USER, **mark}, {**ANSWER, **mark}]}] * 3
    data = InstructionDataModule(str(tmp_path / "model"), [Source(write("a.jsonl", rows))], val_fraction=0.0)
    data.setup("fit")
    (told,) = data.manifest()
    assert "3 turns marked for training that are not the assistant's" in str(told["counts"]).replace("_", " ") or (
        told["counts"]["turns_marked_for_training_that_are_not_the_assistant's"] == 3
    )


def test_images_are_refused(said) -> None:
    with pytest.raises(BadRow, match="'images' holds what is no text, and only text is read"):
        said([{"messages": [USER, ANSWER], "images": ["cat.png"]}])
    assert said([{"messages": [USER, ANSWER], "images": []}]) == "images"


@pytest.mark.parametrize("template", ["auto", "none"])
def test_stages_that_write_prompts_differently(write, tmp_path, template: str) -> None:
    chatml().save_pretrained(tmp_path / "sft" / "model")
    model = str(tmp_path / "sft" / "model")
    sft = InstructionDataModule(
        model, [Source(write("a.jsonl", [{"instruction": "Hi", "output": "Yo"}] * 3))], val_fraction=0.0
    )
    sft.setup("fit")
    assert differs_from_before(sft, model) == []
    (tmp_path / "sft" / "manifest.json").write_text(json.dumps({"data": sft.manifest()}))
    pair = {"prompt": "Hi", "chosen": "a", "rejected": "b"}
    dpo = PreferenceDataModule(model, [Source(write("p.jsonl", [pair] * 2))], val_fraction=0.0, template=template)
    dpo.setup("fit")
    lines = differs_from_before(dpo, model)
    if template == "auto":
        assert lines == []
    else:
        assert "2 prompts are plain text, and" in lines[0]
        assert "was trained on prompts in the chat template: leave out data.template: none" in lines[0]


def test_two_languages_in_one_stage(write, tmp_path) -> None:
    plain().save_pretrained(tmp_path / "model")
    chat, text = [{"instruction": "Hi", "output": "Yo"}], [{"prompt": "Hi", "completion": "Yo"}]
    sources = [Source(write("a.jsonl", chat)), Source(write("b.jsonl", text))]
    data = InstructionDataModule(str(tmp_path / "model"), sources, val_fraction=0.0)
    data.setup("fit")
    (line,) = differs_from_before(data, str(tmp_path / "model"))
    assert line.startswith("1 prompts are written in the chat template, 1 as plain text")
