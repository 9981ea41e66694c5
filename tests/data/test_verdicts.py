"""Answers that were judged one by one: recognised by their label, kept for KTO, never imitated if they are unwanted."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
from data.chats import chatml, show_tree

from lit_align.data.formats import recognise
from lit_align.data.instruction import InstructionDataModule
from lit_align.data.preference import PreferenceDataModule
from lit_align.data.rows import BadRow
from lit_align.data.source import Source

USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}
PAIR = {"prompt": "Hi", "chosen": "Yo", "rejected": "No"}


def judged(wanted: Any, n: int = 0, name: str = "label") -> dict:
    return {"prompt": f"Hi {n}", "completion": "Yo", name: wanted}


@pytest.fixture
def data(write, tmp_path):
    """A data module of one source a list of rows, not yet set up."""

    def made(*sources: list[dict], kind: Any = PreferenceDataModule, module: Any = None, **options: Any):
        chatml().save_pretrained(tmp_path / "model")
        train = [Source(write(f"{i}.jsonl", rows)) for i, rows in enumerate(sources)]
        built = kind(
            str(tmp_path / "model"), train, **{"val_fraction": 0.0, "cache_dir": "none", "batch_size": 2, **options}
        )
        built.module = module
        return built

    return made


KTO = SimpleNamespace(single_answers=True, loss_name="kto")
PAIRS = SimpleNamespace(single_answers=False, loss_name="sigmoid")
LABELS = [(True, False), (1, 0), (1.0, 0.0), ("true", "False"), ("1", "0"), ("chosen", "rejected"), (1, -1)]


@pytest.mark.parametrize(("good", "bad"), LABELS)
@pytest.mark.parametrize("name", ["label", "kto_tag"])
def test_labels_are_recognised_and_kept_for_kto(data, good: Any, bad: Any, name: str) -> None:
    built = data([judged(good, 0, name), judged(bad, 1, name)], module=KTO)
    built.setup("fit")
    (store,) = built.stores("train")
    assert [store[i].ranks for i in range(2)] == [[0.0], [1.0]]
    assert len(built.training_items(9)) == 2
    assert store.tally["judged_one_by_one"] == 2
    assert not store.tally["nothing_to_compare"]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [USER, ANSWER], "label": False},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}], "kto_tag": False},
        {"instruction": "Hi", "input": "", "output": "Yo", "kto_tag": False},
        {"prompt": [USER], "completion": [ANSWER], "label": 0},
    ],
)
def test_other_demonstrations_with_a_verdict(data, row: dict) -> None:
    built = data([row], module=KTO)
    built.setup("fit")
    item = built.stores("train")[0][0]
    assert show_tree(built.tokenizer, item.example) == [
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", "[[Yo<|im_end|>]]"
    ]  # fmt: skip
    assert item.ranks == [1.0]
    # SFT does not imitate an answer that nobody wants.
    imitated = data(
        [row, {**row, **{name: True for name in ("label", "kto_tag") if name in row}}], kind=InstructionDataModule
    )
    imitated.setup("fit")
    (store,) = imitated.stores("train")
    assert (store.tally["answers_labelled_false"], store.tally["examples"]) == (1, 1)
    assert "1 answers labelled false" in str(store.tally)


def test_a_label_that_is_no_verdict(data) -> None:
    assert recognise(judged("mathematics")) == "prompt_completion"
    assert recognise(judged(None)) == "prompt_completion"
    assert recognise({"messages": [USER, ANSWER], "label": 1}) == "messages"
    with pytest.raises(BadRow, match="row 2: field 'label' is 3, expected true or false; if it is no verdict"):
        data([judged(1), judged(3)]).setup("fit")


def test_a_loss_of_pairs_refuses_a_file_of_single_answers(data) -> None:
    says = (
        "0.jsonl: 2 of 2 examples are one answer with a label, and .* with loss: sigmoid compares answers to one prompt"
    )
    with pytest.raises(ValueError, match=f"{says}: set DPOModule's loss: kto, or give pairs"):
        data([judged(1), judged(0, 1)], module=PAIRS).setup("fit")


def test_mixed_with_pairs_each_is_counted(data, caplog) -> None:
    rows = [judged(1), judged(0, 1), judged(1, 2)]
    # A source has one format; two make a mixture.
    built = data([PAIR] * 2, rows, module=KTO)
    built.setup("fit")
    assert len(built.training_items(9)) == 5
    with pytest.raises(ValueError, match=r"1\.jsonl: 3 of 3 examples are one answer"):
        data([PAIR] * 2, rows, module=PAIRS).setup("fit")
    # One file of both, also where `datasets` has filled in nulls.
    null = dict.fromkeys(("chosen", "rejected", "completion", "label"))
    for filled in ({}, null):
        both = [{**filled, **row} for row in (PAIR, *rows, {**PAIR, "prompt": "a"})]
        mixed = data(both, module=PAIRS)
        with caplog.at_level(logging.INFO):
            mixed.setup("fit")
        assert len(mixed.training_items(9)) == 2
        assert "3 of 5 examples are one answer with a label, and are left out" in caplog.text
        caplog.clear()
        mixed = data(both, module=KTO)
        mixed.setup("fit")
        assert len(mixed.training_items(9)) == 5


def test_validation_sources_too(data, write) -> None:
    built = data([PAIR] * 2, module=PAIRS, val=[Source(write("val.jsonl", [judged(1), judged(0, 1)]))])
    built.setup("fit")
    with pytest.raises(ValueError, match=r"val\.jsonl: 2 of 2 examples are one answer with a label"):
        built.val_dataloader()
    built = data([judged(1, n) for n in range(8)], module=KTO, val_fraction=0.3)
    built.setup("fit")
    assert sum(len(batch.rank_Q) for batch in built.val_dataloader()) == len(built._held_out) > 0
