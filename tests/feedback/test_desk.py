from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.annotation import label_for, task_rows, write_rows

pytest.importorskip("sqlalchemy", reason="the page's dependencies are an extra: pip install 'lit_align[annotate]'")

from lit_align.feedback.annotate.desk import HELD, Desk, Rules
from lit_align.feedback.annotate.guideline import Guideline, read_guideline
from lit_align.feedback.annotate.posted import Refused
from lit_align.feedback.annotate.tables import connect, sqlite_url
from lit_align.feedback.labels import read_labels, write_labels
from lit_align.feedback.tasks import Task, build_controls, build_tasks


class Clock:
    def __init__(self) -> None:
        self.now = 1e9

    def __call__(self) -> float:
        self.now += 0.001
        return self.now


def tasks(folder: Path, count: int = 4, k: int = 2) -> list[Task]:
    return build_tasks([write_rows(folder / "tasks.jsonl", task_rows(count, k))])[0]


def desk(folder: Path, made: list[Task] | None = None, guideline: Guideline | None = None, **rules: Any) -> Desk:
    asked = Rules(**{"annotators": ("ada", "bob", "cat"), "per_task": 2, **rules})
    engine = connect(sqlite_url(folder / "labels.db"))
    return Desk(engine, asked, guideline or Guideline(), tasks(folder) if made is None else made, Clock())


def say(at: Desk, name: str, **told: Any) -> dict[str, Any]:
    """Label the task that an annotator has open."""
    return at.store(name, label_for(at.current(name)["task"], at.guideline.version, **told))


def test_each_task_goes_to_as_many_annotators_as_asked_and_never_twice_to_one(tmp_path: Path) -> None:
    at = desk(tmp_path, tasks(tmp_path, 9))
    given: dict[str, list[str]] = {"ada": [], "bob": [], "cat": []}
    open_names = list(given)
    while open_names:
        for name in list(open_names):
            task = at.current(name)["task"]
            if task is None:
                open_names.remove(name)
                continue
            given[name].append(task["id"])
            say(at, name)
    everyone = [task for of in given.values() for task in of]
    assert all(len(of) == len(set(of)) for of in given.values())
    assert sorted(everyone) == sorted([task.id for task in tasks(tmp_path, 9)] * 2)
    assert at.overview()["tasks_done"] == 9


def test_a_reload_shows_the_same_task_and_a_restart_too(tmp_path: Path) -> None:
    at = desk(tmp_path)
    before = at.current("ada")
    assert at.current("ada") == before
    assert desk(tmp_path, []).current("ada") == before


def test_a_label_is_stored_in_the_order_of_the_task_and_comes_back_as_a_row(tmp_path: Path) -> None:
    guideline = Guideline("Read me.", ("helpful", "truthful"), 5)
    at = desk(tmp_path, tasks(tmp_path, 20, 3), guideline)
    for name in ("ada", "bob"):
        for _ in range(20):
            shown = at.current(name)["task"]["completions"]
            best = min(range(3), key=lambda k: shown[k])  # answer 0
            ranks = [0 if k == best else 1 for k in range(3)]
            scores = {"helpful": [5 if k == best else 2 for k in range(3)], "truthful": [1, 1, 1]}
            say(at, name, ranks=ranks, criteria=scores)
    labels = at.labels()
    assert len(labels) == 40
    for label in labels:
        best = min(range(3), key=lambda k: label.completions[k])
        assert label.ranks == tuple(float(k != best) for k in range(3))
        assert label.criteria["helpful"][best] == 5
        assert label.guideline == guideline.version
        assert label.seconds == 1.5
        assert label.sources is not None
        assert all(label.sources)
    assert len({label.shown for label in labels}) == 6
    write_labels(tmp_path / "labels.jsonl", labels)
    assert read_labels(tmp_path / "labels.jsonl") == labels


def test_a_repeated_request_stores_nothing_and_gets_the_same_answer(tmp_path: Path) -> None:
    at = desk(tmp_path)
    posted = label_for(at.current("ada")["task"], at.guideline.version)
    first = at.store("ada", posted)
    assert at.store("ada", posted) == first
    assert len(at.labels()) == 1
    restarted = desk(tmp_path, [])
    assert restarted.store("ada", posted)["task"] == first["task"]
    assert len(restarted.labels()) == 1


def test_undo_withdraws_the_last_label_and_shows_it_again(tmp_path: Path) -> None:
    at = desk(tmp_path)
    with pytest.raises(Refused, match="nothing to undo"):
        at.undo("ada")
    first = at.current("ada")["task"]
    say(at, "ada", strength=3)
    second = at.current("ada")["task"]
    back = at.undo("ada")
    assert back["task"] == first
    assert back["said"]["strength"] == 3
    assert [back["said"]["ranks"][k] for k in back["said"]["shown"]] == [0, 1]
    assert at.labels() == []
    assert at.current("ada")["task"] == first
    say(at, "ada", strength=1)
    assert at.current("ada")["task"] == second
    (label,) = desk(tmp_path, []).labels()
    assert label.strength == 1


def test_skips_and_flags_are_no_labels_and_the_task_goes_to_others(tmp_path: Path) -> None:
    at = desk(tmp_path, tasks(tmp_path, 1), annotators=("ada", "bob", "cat"), per_task=2)
    say(at, "ada", kind="skip", ranks=None, strength=None)
    say(at, "bob", kind="flag", reason="no answer fits", ranks=None, strength=None)
    assert at.labels() == []
    assert at.current("ada")["task"] is None
    assert [flag["reason"] for flag in at.flags()] == ["no answer fits"]
    say(at, "cat")
    assert len(at.labels()) == 1


def test_a_task_that_somebody_left_open_goes_to_another_after_a_while(tmp_path: Path) -> None:
    at = desk(tmp_path, tasks(tmp_path, 1), per_task=1)
    late = label_for(at.current("ada")["task"], at.guideline.version)
    assert at.current("bob")["task"] is None
    at._clock.now += HELD + 1  # type: ignore[attr-defined]
    assert at.current("bob")["task"]["id"] == late["task"]
    at.store("ada", late)  # what was labelled in the end is kept all the same
    assert len(at.labels()) == 1


def bad(**change: Any) -> tuple[dict[str, Any], int]:
    status = change.pop("status", 422)
    return change, status


BAD = [
    bad(kind="other"),
    bad(ranks=[0]),
    bad(ranks=[0, 2]),
    bad(ranks=[0, True]),
    bad(ranks=[0.0, 1.0]),
    bad(ranks=None),
    bad(strength=0),
    bad(strength=4),
    bad(strength=True),
    bad(ranks=[0, 0], strength=1),
    bad(criteria={"helpful": [1, 2]}),
    bad(criteria=[1]),
    bad(id="short"),
    bad(id="é" * 20),
    bad(id=5),
    bad(seconds=-1),
    bad(seconds="1"),
    bad(seconds=float("nan")),
    bad(task=""),
    bad(extra=1),
    bad(kind="flag", reason=" "),
    bad(kind="skip", reason="x" * 2001),
    bad(guideline="other", status=409),
    bad(task="0" * 16, status=404),
]


@pytest.mark.parametrize(("change", "status"), BAD, ids=[str(change)[:60] for change, _ in BAD])
def test_what_the_page_could_not_have_said_is_refused_and_changes_nothing(
    tmp_path: Path, change: dict[str, Any], status: int
) -> None:
    at = desk(tmp_path)
    before = at.current("ada")
    with pytest.raises(Refused) as refused:
        at.store("ada", {**label_for(before["task"], at.guideline.version), **change})
    assert refused.value.status == status
    assert "\n" not in refused.value.reason
    assert at.current("ada") == before
    assert at.labels() == []


@pytest.mark.parametrize("posted", [None, [], "text", 3, {}])
def test_what_is_no_object_is_refused(tmp_path: Path, posted: Any) -> None:
    with pytest.raises(Refused):
        desk(tmp_path).store("ada", posted)


def test_the_task_of_another_annotator_is_refused_as_a_made_up_one_is(tmp_path: Path) -> None:
    at = desk(tmp_path, tasks(tmp_path, 2), per_task=1)
    theirs, _ = at.current("ada"), at.current("bob")
    with pytest.raises(Refused, match="not handed to you") as refused:
        at.store("bob", label_for(theirs["task"], at.guideline.version))
    assert refused.value.status == 404
    say(at, "ada")
    with pytest.raises(Refused) as refused:
        at.store("ada", label_for(theirs["task"], at.guideline.version))
    assert refused.value.status == 409


def controls(folder: Path, count: int) -> list[Task]:
    rows = [{"prompt": f"Control {i}", "chosen": f"right {i}", "rejected": f"wrong {i}"} for i in range(count)]
    return build_controls(write_rows(folder / "controls.jsonl", rows))


def answer(at: Desk, name: str, careful: bool) -> bool:
    """Label one task; a careful annotator knows right from wrong. True if it was a control."""
    shown = at.current(name)["task"]["completions"]
    right = next((k for k, text in enumerate(shown) if text.startswith("right")), None)
    first_is_better = right in (None, 0) if careful else right == 1
    say(at, name, ranks=[0, 1] if first_is_better else [1, 0])
    return right is not None


def test_controls_are_hidden_among_tasks_and_screen_the_careless(tmp_path: Path) -> None:
    made = [*tasks(tmp_path, 200), *controls(tmp_path, 30)]
    at = desk(tmp_path, made, annotators=("ada", "bob"), control_every=5)
    places = [n for n in range(60) if answer(at, "ada", careful=True)]
    assert len(places) == 12
    assert sorted(place // 5 for place in places) == list(range(12))
    assert len({place % 5 for place in places}) > 2
    for _ in range(60):
        if at.current("bob")["task"] is None:
            break
        answer(at, "bob", careful=False)
    assert at.current("bob")["screened"]
    assert not at.current("ada")["screened"]
    assert at.overview()["annotators"][1]["controls"] == 3
    assert {label.annotator for label in at.labels()} == {"ada"}
    assert {label.annotator for label in at.labels(screened=True)} == {"ada", "bob"}
    told = [label for label in at.labels() if label.control]
    assert len(told) == 12
    assert all(label.expected == label.ranks for label in told)


def test_nothing_that_the_page_gets_tells_a_control_or_a_source(tmp_path: Path) -> None:
    made = [*tasks(tmp_path, 3), *controls(tmp_path, 3)]
    at = desk(tmp_path, made, annotators=("ada",), per_task=1, control_every=2)
    kinds = set()
    while (task := at.current("ada")["task"]) is not None:
        kinds.add((tuple(sorted(task)), len(task["id"])))
        assert "source" not in json.dumps(task)
        assert "tasks.jsonl" not in json.dumps(task)
        say(at, "ada")
    assert kinds == {(("completions", "id", "prompt"), 16)}


def test_labels_keep_the_version_of_their_guideline(tmp_path: Path) -> None:
    say(desk(tmp_path), "ada")
    changed = desk(tmp_path, [], Guideline("New words."))
    say(changed, "ada")
    assert [label.guideline for label in changed.labels()] == [Guideline().version, Guideline("New words.").version]


def test_rules_that_make_no_sense_are_refused() -> None:
    for wrong in ({"annotators": ()}, {"annotators": ("a", "a")}, {"annotators": ("a",), "per_task": 2}):
        with pytest.raises(ValueError):
            Rules(**{"per_task": 1, **wrong})
    with pytest.raises(ValueError, match="pass_mark"):
        Rules(("a",), 1, pass_mark=2.0)


def test_a_database_that_cannot_be_used_is_named_without_its_password(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be used") as error:
        connect("postgresql+pg8000://ada:secret-word@127.0.0.1:1/none")
    assert "secret-word" not in str(error.value)
    (tmp_path / "text.db").write_text("no database at all, and long enough to be taken for one" * 20)
    with pytest.raises(ValueError, match=r"text\.db: cannot be used"):
        connect(sqlite_url(tmp_path / "text.db"))
    with pytest.raises(ValueError, match="holds no tasks"):
        desk(tmp_path, [])


def test_a_guideline_is_markdown_whose_html_is_text(tmp_path: Path) -> None:
    path = tmp_path / "guide.md"
    path.write_text(
        "---\ncriteria: [helpful, harmless]\nscale: 7\n---\n# Do\n<b onclick=x>b</b> [l](javascript:x) ![i](u)\n"
    )
    guideline = read_guideline(path)
    assert (guideline.criteria, guideline.scale) == (("helpful", "harmless"), 7)
    html = guideline.html()
    assert "<h1>Do</h1>" in html
    assert "<b" not in html
    assert "<img" not in html
    assert 'href="javascript' not in html
    assert read_guideline(None).version != guideline.version


BAD_GUIDELINES = [
    ("---\ncriteria: helpful\n---\nText", "criteria is 'helpful', expected a list"),
    ("---\ncriteria: [a, a]\n---\nText", "no two alike"),
    ("---\n{a: b\n---\nText", "the header is not YAML"),
    ("---\nscale: 1\n---\nText", "scale is 1"),
    ("---\nscale: 5\nText", "has no end"),
    ("---\nother: 1\n---\nText", "the header has 'other'"),
    ("---\nscale: 5\n---\n \n", "holds no guideline"),
]


@pytest.mark.parametrize(("text", "problem"), BAD_GUIDELINES, ids=[problem for _, problem in BAD_GUIDELINES])
def test_a_header_that_cannot_be_used_is_named(tmp_path: Path, text: str, problem: str) -> None:
    (tmp_path / "guide.md").write_text(text)
    with pytest.raises(ValueError, match=rf"guide\.md: .*{problem}"):
        read_guideline(tmp_path / "guide.md")
