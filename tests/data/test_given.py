"""Objects from Python, saved folders and streams as data sources; models and tokenizers as objects."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pytest
import torch
from lightning import Trainer
from support.tiny import tiny_folder
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_align import DPOModule, InstructionDataModule, Network, PreferenceDataModule, RewardModule, SFTModule, Source
from lit_align.data.rows import Tally

ROWS = [{"instruction": f"Say {n}", "output": str(n)} for n in range(6)]
READ = [f"Say {n}" for n in range(6)]


def read(source: Source) -> list[str]:
    return [row["prompt"][0]["content"] for _, row in source.read("error", Tally())]


def generated():
    yield from ROWS


class Indexed:
    def __len__(self) -> int:
        return len(ROWS)

    def __getitem__(self, i: int) -> dict:
        return ROWS[i]


OBJECTS = {
    "Dataset": lambda: datasets.Dataset.from_list(ROWS),
    "IterableDataset": lambda: datasets.Dataset.from_list(ROWS).to_iterable_dataset(),
    "DatasetDict": lambda: datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}),
    "list": lambda: ROWS,
    "tuple": lambda: tuple(ROWS),
    "function": lambda: generated,
    "arrow": lambda: pyarrow.Table.from_pylist(ROWS),
    "pandas": lambda: datasets.Dataset.from_list(ROWS).to_pandas(),
    "torch": Indexed,
}


@pytest.mark.parametrize("kind", OBJECTS)
def test_objects_hold_rows(kind: str, tokenizer_folder: str) -> None:
    source = Source(rows=OBJECTS[kind]())
    assert read(source) == READ
    assert read(source) == READ  # a second time, as a second stage reads them
    assert read(Source(OBJECTS[kind]())) == READ
    data = InstructionDataModule(tokenizer_folder, [OBJECTS[kind]()], val_fraction=0.0)
    data.prepare_data()
    data.setup("fit")
    assert len(data.training_items(99)) == 6
    assert source.short_name


def test_rows_that_change_are_tokenised_anew() -> None:
    assert (
        Source(rows=ROWS).fingerprint()
        == Source(rows=copy.deepcopy(ROWS)).fingerprint()
        != Source(rows=ROWS[1:]).fingerprint()
    )
    assert Source(rows=generated).fingerprint() is None


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (generated(), "rows is a generator, which can be read once: give the function that makes it"),
        ("rows.jsonl", "is a text: give a file as path="),
        (7, "rows is int: give a data set, a list of dictionaries"),
    ],
)
def test_objects_that_hold_none(given: Any, says: str) -> None:
    with pytest.raises(TypeError, match=says):
        Source(rows=given)
    with pytest.raises(ValueError, match="has no split 'test': set split to one of train"):
        Source(rows=OBJECTS["DatasetDict"](), split="test")
    with pytest.raises(ValueError, match="list, row 2: is 'x', expected a dict"):
        read(Source(rows=[ROWS[0], "x"]))


def test_a_data_set_that_was_saved(tmp_path: Path) -> None:
    whole = datasets.Dataset.from_list(ROWS)
    whole.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": whole, "test": whole.select([5])}).save_to_disk(tmp_path / "several")
    for key in ("path", "hub"):
        assert read(Source(**{key: str(tmp_path / "one")})) == READ
        assert read(Source(**{key: str(tmp_path / "several")})) == READ
    assert read(Source(tmp_path / "several", split="test")) == ["Say 5"]
    assert read(Source(tmp_path / "several", split="train[:2]")) == READ[:2]
    assert read(Source(tmp_path / "several", split="train[4:]+test")) == ["Say 4", "Say 5", "Say 5"]
    with pytest.raises(ValueError, match="has no split 'validation': set split to one of train, test"):
        read(Source(tmp_path / "several", split="validation"))
    assert Source(tmp_path / "one").fingerprint() == Source(tmp_path / "one").fingerprint() is not None
    assert Source(tmp_path / "several").fingerprint() != Source(tmp_path / "several", split="test").fingerprint()


def test_a_folder_of_shards(tmp_path: Path) -> None:
    folder = tmp_path / "shards" / "data"
    folder.mkdir(parents=True)
    for n in range(3):
        part = datasets.Dataset.from_list(ROWS[2 * n : 2 * n + 2])
        part.to_parquet(folder / f"train-0000{n}-of-00003.parquet")
    datasets.Dataset.from_list(ROWS[:1]).to_parquet(folder / "test-00000-of-00001.parquet")
    (tmp_path / "shards" / "README.md").write_text("about")
    assert read(Source(tmp_path / "shards")) == READ
    assert read(Source(tmp_path / "shards", split="test")) == READ[:1]
    assert read(Source(str(folder / "train-*.parquet"))) == READ
    with pytest.raises(ValueError, match="has no file of the split 'validation': set split to one of test, train"):
        read(Source(tmp_path / "shards", split="validation"))
    plain = tmp_path / "plain"
    plain.mkdir()
    for n in range(2):
        (plain / f"part{n}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[3 * n : 3 * n + 3]))
    assert read(Source(plain)) == READ
    before = Source(plain).fingerprint()
    (plain / "part2.jsonl").write_text(json.dumps(ROWS[0]) + "\n")
    assert Source(plain).fingerprint() != before
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no data file .* lies in the folder"):
        read(Source(tmp_path / "empty"))


def test_a_stream_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict] = []

    def load(name: str, subset: str | None, **options: Any) -> Any:
        asked.append({"name": name, "subset": subset, **options})
        held = datasets.Dataset.from_list(ROWS)
        return held.to_iterable_dataset() if options["streaming"] else held

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert read(Source(hub="a/b", subset="c", split="test", revision="v1", streaming=True, limit=3)) == READ[:3]
    assert asked == [{"name": "a/b", "subset": "c", "split": "test", "revision": "v1", "streaming": True}]
    assert Source(hub="a/b", streaming=True).fingerprint() is None
    pinned = [Source(hub="a/b", streaming=True, revision=name).fingerprint() for name in ("v1", "v2", "v1")]
    assert pinned[0] == pinned[2] != pinned[1]
    with pytest.raises(ValueError, match="revision and streaming are of data sets of the hub"):
        Source("x.jsonl", streaming=True)


def test_what_is_not_cached_lies_on_disk_as_long_as_it_is_used(tokenizer_folder: str) -> None:
    data = InstructionDataModule(tokenizer_folder, [Source(rows=generated)], val_fraction=0.0)
    data.setup("fit")
    (file,) = data.stores("train")[0].data.cache_files
    folder = Path(file["filename"]).parent
    assert folder.is_dir()
    del data
    assert not folder.exists()


# Models and tokenizers.


@pytest.mark.parametrize("kind", [SFTModule, DPOModule, RewardModule])
def test_a_model_and_a_tokenizer_as_objects(kind: Any, tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "model")
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    model.config._name_or_path = model.name_or_path = ""
    before, template = copy.deepcopy(model.state_dict()), tokenizer.chat_template
    pairs = [{"instruction": f"Say {n}", "chosen": str(n), "rejected": "no"} for n in range(4)]
    rows, data_kind = (ROWS, InstructionDataModule) if kind is SFTModule else (pairs, PreferenceDataModule)
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    weights = []
    for network, speaker in ((model, tokenizer), (Network(model), tokenizer), (folder, folder)):
        torch.manual_seed(0)
        data = data_kind(speaker, [Source(rows=rows)], val_fraction=0.0, batch_size=2, chat_template="zephyr")
        module = kind(network)
        Trainer(max_steps=2, accelerator="cpu", **quiet).fit(module, data)
        weights.append(module.exported().state_dict())
    # A new scalar head is drawn after what else is drawn in loading.
    for other in weights[1:2] if kind is RewardModule else weights[1:]:
        for name, weight in weights[0].items():
            torch.testing.assert_close(weight, other[name], rtol=0, atol=0)
    # What was given stays as it was.
    assert tokenizer.chat_template == template
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, before[name])


def test_objects_that_are_no_model() -> None:
    with pytest.raises(TypeError, match="expected a Network, or the name or folder of a model, got"):
        DPOModule(torch.nn.Linear(2, 2))
