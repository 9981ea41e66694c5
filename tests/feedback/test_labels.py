from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.tiny import tiny_folder

from lit_align.data import PreferenceDataModule, Source
from lit_align.data.rows import BadRow
from lit_align.feedback.labels import (
    Label,
    control_score,
    label_of,
    neutral_order,
    pairs_of,
    read_labels,
    reordered,
    task_id,
    write_labels,
)

ROW: dict[str, Any] = {
    "prompt": [{"role": "user", "content": "Say it."}],
    "completions": ["one", "two", "three"],
    "ranks": [1, 0, 2],
    "annotator": "ada",
    "criteria": {"helpful": [3, 5, 1]},
    "shown": [2, 0, 1],
    "sources": [[{"source": "a"}], [{"source": "b"}], [{"source": "c"}]],
    "guideline": "v1",
    "category": "talk",
    "seconds": 3.5,
    "finished": [True, False, True],
}


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_a_label_set_is_read_as_it_was_written(tmp_path: Path, ending: str) -> None:
    pair = {"prompt": "Add.", "chosen": "2", "rejected": "3", "annotator": "bob", "strength": 2}
    labels = [label_of(ROW)] if ending == "parquet" else [label_of(ROW), label_of(pair)]
    labels.append(label_of({**ROW, "annotator": "bob", "criteria": {"truthful": [1, 2, 3]}, "expected": [0, 1, 2]}))
    assert write_labels(tmp_path / f"labels.{ending}", labels) == len(labels)
    assert read_labels(tmp_path / f"labels.{ending}") == labels


def test_parquet_refuses_prompts_of_two_kinds_in_one_line(tmp_path: Path) -> None:
    labels = [label_of(ROW), label_of({**ROW, "prompt": "text"})]
    with pytest.raises(ValueError, match=r"labels\.parquet: a column holds values of several kinds .*write \.jsonl"):
        write_labels(tmp_path / "labels.parquet", labels)
    with pytest.raises(ValueError, match=r"ends with \.jsonl or \.parquet"):
        write_labels(tmp_path / "labels.csv", labels)


def test_everything_per_completion_moves_with_its_completion() -> None:
    label = label_of(ROW)
    for k, text in enumerate(ROW["completions"]):
        place = label.completions.index(text)
        assert label.ranks[place] == ROW["ranks"][k]
        assert label.criteria["helpful"][place] == ROW["criteria"]["helpful"][k]
        assert label.sources is not None
        assert label.sources[place] == ROW["sources"][k]
        assert label.finished is not None
        assert label.finished[place] == ROW["finished"][k]
    assert label.shown is not None
    assert [label.completions[k] for k in label.shown] == [ROW["completions"][k] for k in ROW["shown"]]
    assert reordered(reordered(label, [2, 0, 1]), [1, 2, 0]) == label


def test_rows_of_one_task_get_one_name_and_one_order_whatever_order_they_came_in() -> None:
    swapped = {**ROW, "completions": ["three", "one", "two"], "ranks": [2, 1, 0]}
    for name in ("criteria", "shown", "sources", "finished"):
        swapped.pop(name)
    one, other = label_of(ROW), label_of(swapped)
    assert (one.task, one.completions, one.ranks) == (other.task, other.completions, other.ranks)
    assert one.task == task_id(ROW["prompt"], ["two", "one", "three"])
    assert one.task != task_id(ROW["prompt"], ["two", "one"])


def test_neutral_order_does_not_favour_a_side() -> None:
    first = sum(neutral_order([f"chosen {i}", f"rejected {i}"])[0] == 0 for i in range(400))
    assert 150 < first < 250


BAD = [
    ({"annotator": None}, "field 'annotator' is missing"),
    ({"annotator": " "}, "field 'annotator' is empty"),
    ({"ranks": None}, "field 'ranks'"),
    ({"ranks": [1, 2]}, "field 'ranks' has 2 entries for 3 completions"),
    ({"ranks": [[0, 1, 2], [1, 0, 2]]}, "field 'ranks' are of several people"),
    ({"ranks": [0, 1, float("nan")]}, "expected a finite number"),
    ({"completions": ["a"], "ranks": [0]}, "leaves nothing to compare"),
    ({"completions": ["a", "a", "b"]}, "holds the same text twice"),
    ({"completions": ["a", 3, "b"]}, r"field 'completions\[1\]'"),
    ({"strength": 4}, "field 'strength' is 4"),
    ({"strength": True}, "field 'strength' is True"),
    ({"shown": [0, 1, 1]}, r"field 'shown' is \[0, 1, 1\]"),
    ({"criteria": [1]}, "field 'criteria' is list"),
    ({"criteria": {"helpful": [1]}}, r"field 'criteria\.helpful'"),
    ({"expected": [1]}, "field 'expected'"),
    ({"sources": [1]}, "field 'sources'"),
]


@pytest.mark.parametrize(("change", "problem"), BAD, ids=[str(change) for change, _ in BAD])
def test_a_row_that_is_no_label_is_refused_with_file_row_and_field(
    tmp_path: Path, change: dict[str, Any], problem: str
) -> None:
    path = write(tmp_path / "labels.jsonl", ROW, {**ROW, **change})
    with pytest.raises(BadRow, match=rf"labels\.jsonl, row 2: .*{problem}") as error:
        read_labels(path)
    assert "\n" not in str(error.value)


def test_an_empty_file_and_a_missing_one_are_named(tmp_path: Path) -> None:
    (tmp_path / "none.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"none\.jsonl: holds no labels"):
        read_labels(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match="no file matches"):
        read_labels(tmp_path / "missing.jsonl")


def test_pairs_of_a_ranking_as_trl_loads_them() -> None:
    rows = list(pairs_of([Label("p", ("a", "b", "c"), (0.0, 1.0, 1.0), "ada", "t")]))
    assert [(row["prompt"], row["chosen"], row["rejected"]) for row in rows] == [("p", "a", "b"), ("p", "a", "c")]
    (row,) = pairs_of([Label([{"role": "user", "content": "p"}], ("a", "b"), (1.0, 0.0), "ada", strength=3)])
    assert row["chosen"] == [{"role": "assistant", "content": "b"}]
    assert (row["rejected"][0]["content"], row["strength"]) == ("a", 3)


def test_the_score_of_a_control() -> None:
    control = Label("p", ("a", "b", "c"), (0.0, 1.0, 2.0), "ada", expected=(0.0, 2.0, 2.0), control=True)
    assert control_score(control) == 1.0
    assert control_score(Label("p", ("a", "b", "c"), (1.0, 0.0, 1.0), "ada", expected=(0.0, 1.0, 2.0))) == 1 / 3
    assert control_score(Label("p", ("a", "b"), (1.0, 0.0), "ada")) is None


def test_a_label_set_is_a_source_of_preferences(tmp_path: Path) -> None:
    tiny_folder(tmp_path / "model")
    path = tmp_path / "labels.jsonl"
    write_labels(path, [label_of({**ROW, "prompt": "Say"}), label_of({**ROW, "prompt": "Say", "annotator": "bob"})])
    data = PreferenceDataModule(str(tmp_path / "model"), [Source(str(path))])
    data.prepare_data()
    data.setup("fit")
    assert data.training_item(0).ranks == list(label_of(ROW).ranks)
