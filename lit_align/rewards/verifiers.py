"""Rewards that a program can check: the right number, a pattern, a form, a length. None has weights."""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import Decimal
from typing import Any, Literal

from lit_align.rewards.protocol import Reward
from lit_align.types import Completion, Rollout


class TextReward(Reward):
    """Base of rewards that look at one completion at a time; a subclass implements `score`."""

    def forward(self, rollout: Rollout) -> list[float]:
        """One score after another."""
        answers = zip(rollout.rows, rollout.texts, rollout.completions, strict=True)
        return [self.score(*answer) for answer in answers]

    def score(self, row: dict[str, Any], text: str, completion: Completion) -> float:
        """Score a completion, given as text and as tokens, to the prompt of a row."""
        raise NotImplementedError(f"{type(self).__name__} must implement score")

    def column(self, row: dict[str, Any], field: str) -> str:
        """What a column of the row says.

        Raises:
            ValueError: the row has no such column; without it every answer would be wrong.
        """
        if row.get(field) is None:
            raise ValueError(f"{type(self).__name__} needs the column {field!r}; the row has {', '.join(row)}")
        return str(row[field])


class NumericAnswer(TextReward):
    """Whether the final answer is the right number, as GSM8K asks for it: `#### 72` at the end of the reasoning.

    The answer is what follows the last marker on its line. It has to be a number and nothing else (dollars, percent,
    thousands separators and a full stop do not matter), and equal as a number: 3.0 is 3, and 3/4 is none. Right on all
    four models of GSM8K's example solutions, where the marker is `A:`.

    Args:
        reference: column of the row with the solution, marked in the same way, or nothing but the number.
        marker: regular expression of what comes before the answer.
        right: score of the right number.
        wrong: score of another number.
        missing: score of a completion without a marked number.

    Source: Cobbe et al. 2021, "Training Verifiers to Solve Math Word Problems"; its `dataset.py` takes the first
    marker and compares the digits as text.
    """

    def __init__(
        self,
        reference: str = "reference",
        marker: str = r"####|\bA:",
        right: float = 1.0,
        wrong: float = 0.0,
        missing: float = 0.0,
    ) -> None:
        super().__init__()
        self.reference = reference
        self.marker = compiled(marker, "marker")
        self.right, self.wrong, self.missing = right, wrong, missing

    def score(self, row: dict[str, Any], text: str, completion: Completion) -> float:
        """See `TextReward`.

        Raises:
            ValueError: the reference has no number to compare with.
        """
        solution = self.column(row, self.reference)
        expected = self.answer(solution)
        expected = number(solution) if expected is None else expected
        if expected is None:
            raise ValueError(f"no number after {self.marker.pattern!r} in the {self.reference} {solution[-80:]!r}")
        given = self.answer(text)
        if given is None:
            return self.missing
        return self.right if given == expected else self.wrong

    def answer(self, text: str) -> Decimal | None:
        """The number after the last marker."""
        *_, last = (None, *self.marker.finditer(text))
        return number(text[last.end() :].lstrip().partition("\n")[0]) if last else None


def number(text: str) -> Decimal | None:
    """The number that a text is, if it is one."""
    bare = re.sub("[$,]", "", text.replace("\N{MINUS SIGN}", "-")).strip().rstrip(".").removesuffix("%").rstrip()
    return Decimal(bare) if re.fullmatch(r"[-+]?([0-9]+(\.[0-9]*)?|\.[0-9]+)", bare) else None


class RegexReward(TextReward):
    """Whether a regular expression is found in the completion.

    Args:
        pattern: in Python's syntax; `.` does not match a line break unless the pattern begins with `(?s)`.
        whole: the completion has to match from its beginning to its end.
        equals: column of the row that the pattern's first group has to equal, blanks around it aside: the letter of a
            multiple choice, say.
        right: score of a match.
        wrong: score of none.
    """

    def __init__(
        self, pattern: str, whole: bool = False, equals: str | None = None, right: float = 1.0, wrong: float = 0.0
    ) -> None:
        super().__init__()
        self.pattern = compiled(pattern, "pattern")
        if equals is not None and not self.pattern.groups:
            raise ValueError(f"the pattern {pattern!r} has no group to compare with the column {equals!r}")
        self.whole = whole
        self.equals = equals
        self.right, self.wrong = right, wrong

    def score(self, row: dict[str, Any], text: str, completion: Completion) -> float:
        """See `TextReward`."""
        expected = None if self.equals is None else self.column(row, self.equals).strip()
        match = self.pattern.fullmatch(text) if self.whole else self.pattern.search(text)
        if match is None:
            return self.wrong
        return self.right if expected is None or (match[1] or "").strip() == expected else self.wrong


class FormatReward(TextReward):
    """Whether the completion is `<think>...</think><answer>...</answer>`, or has other sections in their order.

    Each section once, with something in it, and nothing but blanks between, before and after them.

    Args:
        sections: names of the tags.
        right: score of the form.
        wrong: score of any other.
    """

    def __init__(self, sections: Sequence[str] = ("think", "answer"), right: float = 1.0, wrong: float = 0.0) -> None:
        super().__init__()
        if not sections:
            raise ValueError("FormatReward needs at least one section")
        # What is inside a section has none of these tags: none is in another, and none is there twice.
        tags = "|".join(f"</?{re.escape(name)}>" for name in sections)
        parts = (f"<{re.escape(name)}>((?:(?!{tags}).)*)</{re.escape(name)}>" for name in sections)
        self.pattern = re.compile(r"\s*" + r"\s*".join(parts) + r"\s*", re.DOTALL)
        self.right, self.wrong = right, wrong

    def score(self, row: dict[str, Any], text: str, completion: Completion) -> float:
        """See `TextReward`."""
        match = self.pattern.fullmatch(text)
        return self.right if match and all(inside.strip() for inside in match.groups()) else self.wrong


class LengthReward(TextReward):
    """How long the completion is, in units of a target: 1 - |n / target - 1|, or 0 up to the target and falling beyond.

    Args:
        target: the length wanted, or allowed.
        shape: near rewards the target and falls by 1 for each target's length away from it; below is 0 up to the
            target, and falls as steeply.
        unit: tokens (without the one that stops), words or characters.
        least: no score is lower.

    Source: Singhal et al. 2023, "A Long Way to Go: Investigating Length Correlations in RLHF" (near, its LPPO).
    """

    def __init__(
        self,
        target: int,
        shape: Literal["near", "below"] = "near",
        unit: Literal["tokens", "words", "characters"] = "tokens",
        least: float = -1.0,
    ) -> None:
        super().__init__()
        if target < 1:
            raise ValueError(f"target must be at least 1, got {target}")
        self.target, self.shape, self.unit, self.least = target, shape, unit, least

    def score(self, row: dict[str, Any], text: str, completion: Completion) -> float:
        """See `TextReward`."""
        if self.unit == "tokens":
            length = len(completion.tokens) - completion.finished
        else:
            length = len(text.split() if self.unit == "words" else text)
        excess = length / self.target - 1.0
        return max(1.0 - abs(excess) if self.shape == "near" else -max(excess, 0.0), self.least)


def compiled(pattern: str, name: str) -> re.Pattern[str]:
    """A regular expression from a configuration.

    Raises:
        ValueError: it is none; says where it breaks.
    """
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{name} {pattern!r} is no regular expression: {error}") from error
