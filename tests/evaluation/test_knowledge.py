from __future__ import annotations

import pytest

from lit_align.evaluation.knowledge import (
    admits_ignorance,
    category,
    choose_rows,
    hallucination,
    right,
    summary,
)


def test_the_four_classes() -> None:
    assert category([1, 1, 1], [1, 0]) == "HighlyKnown"
    assert category([1, 0, 1], [0, 0]) == "MaybeKnown"
    assert category([1] * 19 + [0], [1]) == "MaybeKnown"
    assert category([0, 0, 0], [0, 1]) == "WeaklyKnown"
    assert category([0, 0, 0], [0, 0]) == "Unknown"
    with pytest.raises(ValueError, match="at least one greedy answer"):
        category([], [1])
    assert summary(["Unknown", "Unknown", "MaybeKnown", "WeaklyKnown"])["Unknown"] == 0.5


@pytest.mark.parametrize(
    ("answer", "hit"),
    [
        ("Paris", True),
        ("the paris.", True),
        ("Paris, of course\nLondon", True),
        ("Parish", False),
        ("London Paris", False),
    ],
)
def test_right(answer: str, hit: bool) -> None:
    assert right(answer, ["Paris"]) is hit


def test_rows_that_are_not_known() -> None:
    rows = [{"prompt": "a", "completion": "1"}, {"prompt": "b", "completion": "2"}]
    classes = ["Unknown", "WeaklyKnown"]
    assert choose_rows(rows, classes, "keep") == rows
    assert choose_rows(rows, classes, "drop") == rows[1:]
    assert choose_rows(rows, classes, "relabel")[0] == {"prompt": "a", "completion": "I do not know."}
    with pytest.raises(ValueError, match="keep, drop or relabel, got 'skip'"):
        choose_rows(rows, classes, "skip")


def test_hallucination_by_what_was_known() -> None:
    answers = ["Rome", "I don't know.", "Oslo", "I\u2019m not sure", "Bern"]
    told = hallucination(
        answers, [["Rome"], ["Wien"], ["Paris"], ["x"], ["y"]], [True, True, False, False, False], [1, 1, 0.9, 0.9, 0.2]
    )
    assert told["known"]["right"].value == told["known"]["does_not_know"].value == 0.5
    assert told["unknown"]["wrong"].value == pytest.approx(2 / 3)
    assert told["unknown"]["confident_wrong"].value == pytest.approx(1 / 3)
    assert admits_ignorance("It is not known to me.")
