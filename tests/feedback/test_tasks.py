from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from lit_align.data.rows import BadRow
from lit_align.feedback.tasks import Task, build_controls, build_tasks, label_for, shown_order


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_completions_of_several_models_become_one_task_and_copies_keep_their_sources(tmp_path: Path) -> None:
    one = write(
        tmp_path / "one.jsonl",
        {"prompt": "p", "completions": ["a", "b", "a"], "finished": [False, True, True], "temperature": 0.7},
        {"prompt": "q", "completions": ["a", "c"]},
    )
    two = write(tmp_path / "two.jsonl", {"prompt": "p", "completions": ["b", "d"], "category": "talk"})
    tasks, counts = build_tasks([one, two], names=["sft", "ppo"])
    assert [task.prompt for task in tasks] == ["p", "q"]
    task = tasks[0]
    assert sorted(task.completions) == ["a", "b", "d"]
    of = dict(zip(task.completions, task.sources, strict=True))
    assert of["a"] == [
        {"source": "sft", "row": 1, "completion": 0, "temperature": 0.7},
        {"source": "sft", "row": 1, "completion": 2, "temperature": 0.7},
    ]
    assert [copy["source"] for copy in of["b"]] == ["sft", "ppo"]
    assert task.finished is not None
    assert dict(zip(task.completions, task.finished, strict=True)) == {"a": True, "b": True, "d": True}
    assert counts == {"rows": 3, "completions": 7, "duplicates_merged": 2, "tasks": 2}


def test_the_order_of_files_does_not_show_in_a_task(tmp_path: Path) -> None:
    rows = [[{"prompt": f"p{i}", "completions": [f"{m} {i}"]} for i in range(200)] for m in ("sft", "ppo")]
    one, two = (write(tmp_path / f"{k}.jsonl", *part) for k, part in enumerate(rows))
    tasks, _ = build_tasks([one, two])
    assert build_tasks([two, one])[0] == [
        Task(**{**vars(t), "sources": s.sources}) for t, s in zip(tasks, build_tasks([two, one])[0], strict=True)
    ]
    first = sum(task.completions[0].startswith("sft") for task in tasks)
    assert 70 < first < 130


def test_each_annotator_sees_an_order_of_their_own_that_a_reload_does_not_change() -> None:
    orders = [shown_order(f"task {i}", 3, "ada") for i in range(600)]
    assert orders == [shown_order(f"task {i}", 3, "ada") for i in range(600)]
    assert orders != [shown_order(f"task {i}", 3, "bob") for i in range(600)]
    assert orders != [shown_order(f"task {i}", 3, "ada", seed=1) for i in range(600)]
    assert min(Counter(orders).values()) > 60
    assert len(Counter(orders)) == 6


BAD = [
    ({"prompt": "p"}, "field 'completions' is missing"),
    ({"prompt": "p", "completions": []}, "field 'completions' is an empty list"),
    ({"prompt": "p", "completions": "text"}, "field 'completions' is str"),
    ({"prompt": "p", "completions": [None, "b"]}, r"field 'completions\[0\]' is null"),
    ({"completions": ["a", "b"]}, "field 'prompt'"),
    ({"prompt": "p", "completions": [f"{k}" for k in range(30)]}, "come to 30 distinct answers.* at most 26"),
    ({"prompt": "p", "completions": ["a" * 600_000, "b" * 600_000]}, "hold 1,200,001 characters"),
]


@pytest.mark.parametrize(("row", "problem"), BAD, ids=[problem for _, problem in BAD])
def test_a_bad_task_is_refused_in_one_line_with_file_and_row(tmp_path: Path, row: dict[str, Any], problem: str) -> None:
    path = write(tmp_path / "tasks.jsonl", {"prompt": "fine", "completions": ["a", "b"]}, row)
    with pytest.raises(BadRow, match=rf"tasks\.jsonl, row 2: .*{problem}") as error:
        build_tasks([path])
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400


ODD = [
    "",
    "x" * 100_000,
    "مرحبا بالعالم",
    "👩‍🔬🎉",
    r"$\frac{a}{b}$",
    "```python\nprint('<b>')\n```",
    "\x1b[31mred",
    "a\u202eb",
]


def test_odd_texts_are_kept_as_they_are(tmp_path: Path) -> None:
    ((task,), _) = build_tasks([write(tmp_path / "tasks.jsonl", {"prompt": "p", "completions": ODD})])
    assert sorted(task.completions) == sorted(ODD)


def test_a_prompt_with_one_distinct_completion_is_left_out_and_counted(tmp_path: Path) -> None:
    rows = [{"prompt": "p", "completions": ["a", "a"]}, {"prompt": "q", "completions": ["a", "b"]}]
    tasks, counts = build_tasks([write(tmp_path / "tasks.jsonl", *rows)])
    assert len(tasks) == counts["left_out_with_one_distinct_completion"] == 1
    with pytest.raises(ValueError, match="no prompt has two distinct completions to compare: sample more"):
        build_tasks([write(tmp_path / "same.jsonl", rows[0])])


def test_controls_need_an_answer_that_is_right(tmp_path: Path) -> None:
    path = write(tmp_path / "controls.jsonl", {"prompt": "p", "chosen": "good", "rejected": "bad"})
    (control,) = build_controls(path)
    assert control.answer is not None
    assert control.completions[control.answer.index(0.0)] == "good"
    label = label_for(control, "ada", control.answer, seconds=2.0)
    assert label.control
    assert label.expected == label.ranks == control.answer
    tied = write(tmp_path / "tied.jsonl", {"prompt": "p", "completions": ["a", "b"], "ranks": [0, 0]})
    with pytest.raises(BadRow, match=r"tied\.jsonl, row 1: .*ranks.* tie"):
        build_controls(tied)


def test_the_same_prompt_with_other_tools_is_another_task(tmp_path: Path) -> None:
    tools = [{"name": "add", "description": "", "parameters": {}}]
    rows = [{"prompt": "p", "completions": ["a", "b"]}, {"prompt": "p", "completions": ["c", "d"], "tools": tools}]
    tasks, _ = build_tasks([write(tmp_path / "tasks.jsonl", *rows)])
    assert [len(task.completions) for task in tasks] == [2, 2]
    assert tasks[1].tools
