"""Labels in tokens: four continuations, of which one was chosen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.tiny import tiny_folder
from transformers import AutoTokenizer

from lit_align import PreferenceDataModule, PromptDataModule, Source
from lit_align.data.best_of import BestOf
from lit_align.data.rows import BadRow, Tally


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_folder(tmp_path_factory.mktemp("model"))


def label(folder: str, query: str, *samples: str, **changed: Any) -> dict[str, Any]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (query, *samples)]
    return {"query": ids[0], **{f"sample{i}": sample for i, sample in enumerate(ids[1:])}, **changed}


def written(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text(json.dumps(list(rows)))
    return str(path)


def test_tokens_become_rankings(folder: str, tmp_path: Path) -> None:
    path = written(tmp_path / "labels.json", label(folder, "A bee", " hums", " sits", " naps", " eats", best=2))
    source = Source(rows=BestOf(path, folder))
    ((_, row),) = source.read("error", Tally())
    assert row == {
        "prompt": "A bee",
        "completions": [" hums", " sits", " naps", " eats"],
        "ranks": [1.0, 1.0, 0.0, 1.0],
        "finished": [False] * 4,
    }
    # None was finished, so none ends with the end of sequence; and the best against three others are three pairs.
    data = PreferenceDataModule(folder, [source], template="none", cache_dir="none")
    (item,) = data.encode(row, Tally())
    assert [data.tokenizer.decode(list(branch.tokens)) for branch in item.example.branches] == row["completions"]
    assert item.ranks == [1.0, 1.0, 0.0, 1.0]
    # The query serves as a prompt to continue.
    prompts = PromptDataModule(folder, [source], cache_dir="none")
    (item,) = prompts.encode(row, Tally())
    assert item.row == {"prompt": "A bee"}


def test_what_was_tokenised_is_cached_until_the_file_changes(folder: str, tmp_path: Path) -> None:
    path = written(tmp_path / "labels.json", label(folder, "A bee", " hums", " sits", best=0))
    before = BestOf(path, folder).fingerprint
    assert Source(rows=BestOf(path, folder)).cacheable
    assert BestOf(path, folder).fingerprint == before != BestOf(path, "another").fingerprint
    written(tmp_path / "labels.json", label(folder, "A bee", " hums", " sits", best=1))
    assert BestOf(path, folder).fingerprint != before


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"best": 2}, "'best' is 2, expected one of 0 to 1"),
        ({"best": -1}, "'best' is -1"),
        ({"best": "1"}, "'best' is str"),
        ({"query": "A bee"}, "'query' is str, expected a list"),
        ({"sample1": [1, "2"]}, r"'sample1' is \[1, '2'\], expected token ids"),
        ({"sample0": []}, "'sample0' is an empty list"),
    ],
)
def test_a_bad_label_is_named(folder: str, tmp_path: Path, changed: dict[str, Any], problem: str) -> None:
    good = label(folder, "A bee", " hums", " sits", best=0)
    path = written(tmp_path / "labels.json", good, {**good, **changed})
    with pytest.raises(BadRow, match=rf"labels.json, row 2: field {problem}"):
        list(BestOf(path, folder))
    path = written(tmp_path / "one.json", label(folder, "A bee", " hums", best=0))
    with pytest.raises(BadRow, match="nothing to choose from"):
        list(BestOf(path, folder))
