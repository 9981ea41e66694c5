from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from support.annotation import write_rows

from lit_align.cli import main
from lit_align.data.formats import FORMATS, recognise
from lit_align.data.rows import BadRow
from lit_align.feedback.answerers import Answer, Folder
from lit_align.feedback.judge import Cache
from lit_align.feedback.revise import REVISION, Principle, read_answers, read_principles, revise


class Fake:
    """Criticises and revises by a counter; empty for the first `silent` attempts."""

    name = "fake"

    def __init__(self, silent: int = 0) -> None:
        self.silent, self.asked = silent, list[Any]()

    def answer(self, messages: Any, attempt: int) -> Answer:
        self.asked.append(messages)
        if attempt < self.silent:
            return Answer(" \n", 1, 1)
        last = messages[-1]["content"]
        kind = "revision" if last == REVISION else "critique" if last.startswith("Criticise") else "answer"
        return Answer(f"{kind} {len(self.asked)} ", 3, 2)


PRINCIPLES = [Principle("Be kind.", "Criticise: kind?"), Principle("Be brief.", "Criticise: brief?")]


def test_each_round_criticises_the_last_revision_and_all_texts_are_kept(tmp_path: Path) -> None:
    fake, counts = Fake(), Counter[str]()
    row = revise("Say.", "first", PRINCIPLES, fake, Cache(tmp_path / "c.jsonl"), counts, rounds=3)
    assert row is not None
    assert row["initial"] == "first"
    assert row["completion"] == row["steps"][-1]["revision"] == "revision 6"
    assert {step["principle"] for step in row["steps"][:2]} == {"Be kind.", "Be brief."}
    assert [m["content"] for m in fake.asked[0][:2]] == ["Say.", "first"]
    assert (
        fake.asked[2][1]["content"] == row["steps"][0]["revision"] == "revision 2"
    )  # the second round begins with the first revision
    assert len(fake.asked[2]) == 3
    assert (counts["calls"], counts["prompt_tokens"]) == (6, 18)
    assert recognise(row) == "prompt_completion"
    assert FORMATS["prompt_completion"](row)[0]["completion"] == "revision 6"


def test_the_model_answers_where_a_row_has_no_answer_and_messages_stay_messages(tmp_path: Path) -> None:
    prompt = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Say."}]
    row = revise(prompt, None, PRINCIPLES, Fake(), Cache(tmp_path / "c.jsonl"), Counter())
    assert row is not None
    assert row["initial"] == "answer 1"
    assert row["prompt"] == prompt


def test_it_goes_on_where_it_stopped_and_the_seed_draws_the_principle(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "c.jsonl")
    first = revise("Say.", "x", PRINCIPLES, Fake(), cache, Counter())
    again = Fake()
    assert revise("Say.", "x", PRINCIPLES, again, Cache(tmp_path / "c.jsonl"), Counter()) == first
    assert again.asked == []
    made = [revise("Say.", "x", PRINCIPLES, Fake(), cache, Counter(), seed=seed) for seed in range(12)]
    assert {row["steps"][0]["principle"] for row in made if row} == {"Be kind.", "Be brief."}


def test_an_empty_text_is_asked_for_again_and_then_left_out(tmp_path: Path) -> None:
    assert revise("Say.", "x", PRINCIPLES, Fake(silent=2), Cache(tmp_path / "a.jsonl"), Counter()) is not None
    assert revise("Say.", "x", PRINCIPLES, Fake(silent=3), Cache(tmp_path / "b.jsonl"), Counter()) is None


def test_principles_are_texts_or_have_requests_of_their_own(tmp_path: Path) -> None:
    path = tmp_path / "principles.yaml"
    path.write_text("- Be kind.\n- {text: Be brief., critique: 'Too long?', revision: Shorten it.}\n")
    kind, brief = read_principles(path)
    assert kind.critique.endswith("Be kind.")
    assert (brief.critique, brief.revision) == ("Too long?", "Shorten it.")


BAD = [
    ("{a: 1}", "holds dict, expected a list"),
    ("- {a: b", "is not YAML: while parsing"),
    ("[]", "holds list, expected a list"),
    ("- 3", "principle 1: is 3"),
    ("- a\n- {critique: b}", "principle 2: is"),
    ("- {text: a, other: b}", "principle 1: is"),
    ("- {text: ' '}", "principle 1: .*not empty"),
]


@pytest.mark.parametrize(("text", "problem"), BAD, ids=[text for text, _ in BAD])
def test_a_file_that_holds_no_principles_is_named(tmp_path: Path, text: str, problem: str) -> None:
    (tmp_path / "principles.yaml").write_text(text)
    with pytest.raises(ValueError, match=rf"principles\.yaml.*{problem}"):
        read_principles(tmp_path / "principles.yaml")


def test_answers_to_revise_are_read_from_rows_of_each_kind(tmp_path: Path) -> None:
    rows = [
        {"prompt": "a"},
        {"prompt": "b", "completion": "x", "category": "talk"},
        {"prompt": "c", "completions": ["y", "z"]},
    ]
    read = list(read_answers([write_rows(tmp_path / "rows.jsonl", rows)]))
    assert [answer for _, answer in read] == [None, "x", "y"]
    assert read[1][0] == {"prompt": "b", "category": "talk"}
    with pytest.raises(BadRow, match=r"bad\.jsonl, row 1: .*completion.* is int"):
        list(read_answers([write_rows(tmp_path / "bad.jsonl", [{"prompt": "a", "completion": 3}])]))


def test_the_command_writes_demonstrations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Fake()
    monkeypatch.setattr(Folder, "__init__", lambda self, folder, max_tokens: setattr(self, "name", folder))
    monkeypatch.setattr(Folder, "answer", lambda self, messages, attempt: fake.answer(messages, attempt))
    file = write_rows(tmp_path / "rows.jsonl", [{"prompt": "a"}, {"prompt": "b", "completion": "x"}])
    (tmp_path / "p.yaml").write_text("- Be kind.\n")
    told = ["--principles", str(tmp_path / "p.yaml"), "--out", str(tmp_path / "out"), "--model", "m"]
    counts = main(["revise", str(file), *told])
    assert (counts["revised"], counts["calls"]) == (2, 5)
    assert len((tmp_path / "out" / "revised.jsonl").read_text().splitlines()) == 2
    with pytest.raises(ValueError, match="--rounds must be at least 1"):
        main(["revise", str(file), *told, "--rounds", "0"])
