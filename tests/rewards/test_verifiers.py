"""Rewards that a program checks.

A mutant that a test was seen to kill is named above it.
"""

from __future__ import annotations

import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser

import lit_align
from lit_align import (
    FormatReward,
    LengthReward,
    NumericAnswer,
    RegexReward,
    Reward,
    TextReward,
)
from lit_align.rewards.verifiers import number
from lit_align.types import Completion, Rollout


def rollout(texts: list[str], rows: list[dict[str, Any]] | None = None, finished: bool = True) -> Rollout:
    """A token for each word, and one that stops."""
    completions = [Completion(list(range(len(text.split()) + finished)), finished) for text in texts]
    return Rollout([torch.tensor([1])] * len(texts), rows or [{"prompt": "?"}] * len(texts), completions, texts, 1)


def scores(reward: Reward, texts: list[str], rows: list[dict[str, Any]] | None = None) -> list[float]:
    return reward(rollout(texts, rows)).tolist()


# Kills: commas, dollars, percent or the full stop kept; text for number; anything after the number allowed.
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        *(
            ("72", "72"),
            (" 72.", "72"),
            ("3.0", "3"),
            ("$1,450,000.50", "1450000.5"),
            ("50 %", "50"),
            (".5", "0.5"),
            ("1.50%.", "1.5"),
        ),
        *(("-$5", "-5"), ("$-5", "-5"), ("\N{MINUS SIGN}5", "-5"), ("+7", "7"), ("5.", "5"), ("007", "7")),
        *(
            (text, None)
            for text in ("", ".", "$", "3/4", "1 2", "5+John's age", "-1.5 billion", "1e3", "٣", "--5", "a")
        ),
    ],
)
def test_number(text: str, expected: str | None) -> None:
    assert number(text) == (None if expected is None else Decimal(expected))


# Kills: the first marker for the last; the rest of the text for the rest of the line; equal as text.
def test_numeric_answer_by_hand() -> None:
    texts = [
        "Half of 48 is <<48/2=24>>24.\n#### 72",
        "#### 71\nNo, wait.\n#### $72.00",
        "#### 72\nNo, wait.\n#### 71",
        "#### 72\n\nWhat next?",
        "####\n72",
        "It is 72.",
        "#### 72 clips",
        "A: 72",
        "CIA: 72",
    ]
    reward = NumericAnswer(right=2.0, wrong=-1.0, missing=-0.5)
    rows = [{"prompt": "?", "reference": "48 + 24 = 72\n#### 72"}] * len(texts)
    assert scores(reward, texts, rows) == [2.0, 2.0, -1.0, 2.0, 2.0, -0.5, -0.5, 2.0, -0.5]


# Kills: the bare number refused; the column's name fixed.
def test_numeric_answer_takes_its_reference_from_a_column() -> None:
    rows: list[dict[str, Any]] = [{"solution": "1,000"}, {"solution": 1000}, {"solution": "so\nA: 1000"}]
    assert scores(NumericAnswer("solution"), ["#### 1000"] * 3, rows) == [1.0] * 3
    boxed = NumericAnswer("solution", marker="answer is")
    assert scores(boxed, ["The answer is 1000.", "#### 1000"], rows[:2]) == [1.0, 0.0]


# Kills: a wrong score where there is nothing to compare with.
def test_what_cannot_be_verified_is_an_error() -> None:
    with pytest.raises(ValueError, match="NumericAnswer needs the column 'reference'; the row has prompt, answer"):
        NumericAnswer()(rollout(["#### 1"], [{"prompt": "?", "answer": "1"}]))
    with pytest.raises(ValueError, match=r"no number after '####\|.*' in the reference 'about a dozen'"):
        NumericAnswer()(rollout(["#### 12"], [{"reference": "about a dozen"}]))
    with pytest.raises(ValueError, match=r"marker '\(' is no regular expression: missing \)"):
        NumericAnswer(marker="(")


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.realdata
@pytest.mark.parametrize(
    ("model", "right"),
    [("6b_finetuning", 286), ("6b_verification", 515), ("175b_finetuning", 458), ("175b_verification", 742)],
)
def test_gsm8k_example_solutions_are_judged_as_published(model: str, right: int, realdata: Path) -> None:
    rows = lines(realdata / "gsm8k" / "example_model_solutions.jsonl")
    assert len(rows) == 1319
    got = scores(NumericAnswer("ground_truth"), [row[model]["solution"] for row in rows], rows)
    assert got == [float(row[model]["is_correct"]) for row in rows]
    assert sum(got) == right  # .217, .390, .347 and .563 of 1,319


@pytest.mark.realdata
def test_gsm8k_solutions_are_right_and_those_of_another_question_rarely(realdata: Path) -> None:
    for name, count in (("train", 7473), ("test", 1319)):
        rows = lines(realdata / "gsm8k" / f"{name}.jsonl")
        answers = [row["answer"] for row in rows]
        assert scores(NumericAnswer("answer"), answers, rows) == [1.0] * count
        assert sum(scores(NumericAnswer("answer"), answers[1:] + answers[:1], rows)) < 0.03 * count


# Kills: search for fullmatch; the wrong group; the column not stripped.
def test_regex() -> None:
    texts = ["I am sorry, but no.", "sorry", "Sure."]
    assert scores(RegexReward("sorry"), texts) == [1.0, 1.0, 0.0]
    assert scores(RegexReward("sorry", whole=True, right=-1.0, wrong=0.5), texts) == [0.5, -1.0, 0.5]
    assert scores(RegexReward("(?i)SURE"), texts) == [0.0, 0.0, 1.0]
    letter = RegexReward(r"answer is\s*([A-D])?", equals="label")
    rows = [{"label": "B "}] * 4
    assert scores(letter, ["The answer is B", "The answer is C", "B", "The answer is E"], rows) == [1.0, 0.0, 0.0, 0.0]
    assert scores(RegexReward("is (.*)", equals="label"), ["It is  B "], rows[:1]) == [1.0]
    with pytest.raises(ValueError, match="needs the column 'label'"):
        letter(rollout(["B"]))
    with pytest.raises(ValueError, match="has no group to compare with the column 'label'"):
        RegexReward("[A-D]", equals="label")
    with pytest.raises(ValueError, match=r"pattern '\[' is no regular expression"):
        RegexReward("[")


# Kills: order ignored; text outside; a section twice, nested or empty; no DOTALL; names not escaped.
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think>a\nb</think>\n<answer>c</answer>", 1.0),
        ("  <think>1 < 2</think><answer>yes <b>2</b></answer>\n", 1.0),
        ("<answer>c</answer><think>a</think>", 0.0),
        ("<think>a</think>", 0.0),
        ("so <think>a</think><answer>c</answer>", 0.0),
        ("<think>a</think><answer>c</answer> done", 0.0),
        ("<think>a</think> so <answer>c</answer>", 0.0),
        ("<think>a</think><think>b</think><answer>c</answer>", 0.0),
        ("<think><think>a</think></think><answer>c</answer>", 0.0),
        ("<think>a<answer>c</answer></think><answer>c</answer>", 0.0),
        ("<think> </think><answer>c</answer>", 0.0),
        ("<think>a</think><answer></answer>", 0.0),
        ("<think>a</think><answer>c", 0.0),
    ],
)
def test_format(text: str, expected: float) -> None:
    assert scores(FormatReward(), [text]) == [expected]


def test_format_of_other_sections() -> None:
    texts = ["<a.b>x</a.b>", "<acb>x</a.b>", "<a.b>x</acb>"]
    assert scores(FormatReward(["a.b"], 0.5, -0.5), texts) == [0.5, -0.5, -0.5]
    with pytest.raises(ValueError, match="at least one section"):
        FormatReward([])


# Kills: the stop token counted; units exchanged; shapes exchanged; least dropped; one side only.
def test_length() -> None:
    texts = ["", "a", "one two", "one two three", "a b c d e f g h i"]
    assert scores(LengthReward(2), texts) == [0.0, 0.5, 1.0, 0.5, -1.0]
    assert scores(LengthReward(2, "below"), texts) == [0.0, 0.0, 0.0, -0.5, -1.0]
    assert scores(LengthReward(2, "below", least=-10.0), texts) == [0.0, 0.0, 0.0, -0.5, -3.5]
    assert scores(LengthReward(2, unit="words"), texts) == [0.0, 0.5, 1.0, 0.5, -1.0]
    assert scores(LengthReward(7, "below", "characters"), texts)[:4] == pytest.approx([0.0, 0.0, 0.0, -6 / 7])
    assert LengthReward(2)(rollout(["one two"], finished=False)).tolist() == [1.0]
    with pytest.raises(ValueError, match="target must be at least 1"):
        LengthReward(0)


def test_a_users_own() -> None:
    class Shouts(TextReward):
        def score(self, row: dict[str, Any], text: str, completion: Completion) -> float:
            return float(text.isupper()) if row["prompt"] == "?" else float("nan")

    assert scores(Shouts(), ["A", "a"]) == [1.0, 0.0]
    with pytest.raises(ValueError, match="Shouts returned nan for 1 of 1 completions; the prompts: '!'"):
        scores(Shouts(), ["a"], [{"prompt": "!"}])
    with pytest.raises(NotImplementedError, match="TextReward must implement score"):
        scores(TextReward(), ["a"])


def test_a_configuration_reaches_them_by_class_path() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--reward", type=Reward)
    parts = [
        {"class_path": "lit_align.NumericAnswer", "init_args": {"wrong": -0.5}},
        {"class_path": "lit_align.FormatReward", "init_args": {"sections": ["think"]}},
        {"class_path": "lit_align.RegexReward", "init_args": {"pattern": "x"}},
        {"class_path": "lit_align.LengthReward", "init_args": {"target": 2, "shape": "below"}},
    ]
    total = {"class_path": "lit_align.SumReward", "init_args": {"rewards": parts, "weights": [1.0, 0.1, 0.0, 1.0]}}
    reward = parser.instantiate(parser.parse_object({"reward": total})).reward
    assert scores(reward, ["<think>x</think>", "#### 3"], [{"reference": "#### 3"}] * 2) == pytest.approx([0.1, 1.0])
    assert {"NumericAnswer", "FormatReward", "RegexReward", "LengthReward", "SumReward"} <= set(lit_align.__all__)
