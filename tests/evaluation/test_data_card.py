from __future__ import annotations

import json
from pathlib import Path

import pytest

from lit_align.cli import main
from lit_align.evaluation.data_card import Told, as_told, data_card, overlaps


def test_every_kind_of_row() -> None:
    ask = [{"role": "user", "content": "a"}]
    assert as_told({"messages": [*ask, {"role": "assistant", "content": "b"}]}) == Told("a", ["b"], [], [])
    assert as_told({"prompt": ask, "completion": "b"}) == Told("a", ["b"], [], [])
    assert as_told({"text": "t"}) == Told("", ["t"], [], [])
    assert as_told({"prompt": "a", "completions": ["x", "y"], "ranks": [0, 1]}) == Told("a", ["x", "y"], [0, 1], [])
    assert as_told({"prompt": "a"}) == Told("a", [], [], [])


def test_what_is_counted() -> None:
    rows = [
        Told("p1", ["- one\n- two"], [], []),
        Told("p2", ["```x```  see https://a.b"], [], []),
        Told("P2!", ["I can't help with that."], [], []),
        Told("p3", [""], [], []),
        Told("p1", ["- one\n- two"], [], []),
    ]
    card = data_card(rows, resamples=50)
    assert (card["rows"], card["different_prompts"], card["repeated_rows"], card["empty_answers"]) == (5, 3, 1, 1)
    shares = {name: card[name].value for name in ("lists", "code", "references", "refusals")}
    assert shares == {"lists": 0.4, "code": 0.2, "references": 0.2, "refusals": 0.2}
    assert card["lists"].clusters == 3
    assert "longer_preferred" not in card


def test_preferences_and_annotators() -> None:
    rows = [
        Told("a", ["x y", "x"], [0, 1], []),
        Told("b", ["x", "x y"], [0, 1], []),
        Told("c", ["x", "x"], [0, 0], []),
        Told("d", ["x", "x y z"], [1, 0], [0.25]),
    ]
    card = data_card(rows, resamples=50)
    assert (card["pairs"], card["ties"], card["identical_answers"]) == (4, 1, 1)
    assert card["longer_preferred"].value == pytest.approx(2 / 3)
    assert card["better_comes_first"].value == pytest.approx(2 / 3)
    assert (card["annotators_agree"].value, card["annotator_with_majority"].value) == (0.625, 0.75)


def test_overlap() -> None:
    train = [Told(p, ["x"], [], []) for p in ("A b?", "c", "c", "d")]
    valid = [Told(p, ["y"], [], []) for p in ("a  B", "e")]
    assert overlaps([train, valid]) == [[0.5, 0.25], [0.5, 0.0]]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "train.jsonl").write_text(
        "".join(json.dumps({"instruction": f"say {i}", "output": "yes " * i}) + "\n" for i in range(1, 10))
        + json.dumps({"instruction": "say", "output": 3})
        + "\n"
    )
    (tmp_path / "pairs.jsonl").write_text(
        "".join(json.dumps({"prompt": f"say {i}", "chosen": "y " * i, "rejected": "no"}) + "\n" for i in range(1, 10))
    )
    args = ["evaluate", "data", str(tmp_path / "train.jsonl"), str(tmp_path / "pairs.jsonl")]
    figures = main([*args, "--out", str(tmp_path / "out"), "--resamples", "50"])
    assert figures["sources/train/skipped"] == 1
    assert figures["sources/pairs/longer_preferred"] == pytest.approx(8.5 / 9)
    told = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert told["overlap"] == {"train": [0.0, 1.0], "pairs": [1.0, 0.0]}
    shown = capsys.readouterr().out
    assert "9 of 9 rows of train have a prompt that pairs holds, too." in shown
    assert "row 10: field 'output' is int" in shown
    assert "<svg" in (tmp_path / "out" / "report.html").read_text()
    with pytest.raises(ValueError, match="no file matches"):
        main(["evaluate", "data", str(tmp_path / "no.jsonl")])
    with pytest.raises(ValueError, match="evaluate data takes SOURCES"):
        main(["evaluate", "data"])
