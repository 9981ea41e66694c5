"""Rewards that a program can verify: a number, a pattern, a format, a length. None has weights."""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import Decimal
from typing import Any, Literal

from lit_align.rewards.protocol import Reward
from lit_align.types import Completion, Rollout


class TextReward(Reward):
    """Base of rewards that score one completion at a time. A subclass implements `score`."""

    def forward(self, rollout: Rollout) -> list[float]:
        """Score each completion. Shape (Q,)."""
        answers = zip(rollout.rows, rollout.texts, rollout.completions, strict=True)
        return [self.score(*answer) for answer in answers]

    def score(self, row: dict[str, Any], text: str, completion: Completion) -> float:
        """Score a completion (as text and as tokens) of the prompt of a row."""
        raise NotImplementedError(f"{type(self).__name__} must implement score")

    def column(self, row: dict[str, Any], field: str) -> str:
        """Content of a column of the row, as text.

        Raises:
            ValueError: the row has no such column, without which every completion would be wrong.
        """
        if row.get(field) is None:
            raise ValueError(f"{type(self).__name__} needs the column {field!r}; the row has {', '.join(row)}")
        return str(row[field])


class NumericAnswer(TextReward):
    """Check that the final answer is the right number, as GSM8K asks for it: `#### 72` at the end of the reasoning.

    The answer is the rest of the line after the last marker. It must be a number and nothing else; a dollar or percent
    sign, thousands separators and a full stop are ignored. Numbers are compared by value: 3.0 equals 3, and 3/4 is
    not a number. It is right on all example solutions of GSM8K's four models, where the marker is `A:`.

    Args:
        reference: column of the row with the solution: marked in the same way, or only the number.
        marker: regular expression that precedes the answer.
        right: score of the right number.
        wrong: score of any other number.
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
        """Number after the last marker; None if there is none."""
        *_, last = (None, *self.marker.finditer(text))
        return number(text[last.end() :].lstrip().partition("\n")[0]) if last else None


def number(text: str) -> Decimal | None:
    """Parse a text as a number; None if it is not one."""
    bare = re.sub("[$,]", "", text.replace("\N{MINUS SIGN}", "-")).strip().rstrip(".").removesuffix("%").rstrip()
    return Decimal(bare) if re.fullmatch(r"[-+]?([0-9]+(\.[0-9]*)?|\.[0-9]+)", bare) else None


class RegexReward(TextReward):
    """Check that a completion matches a regular expression.

    Args:
        pattern: regular expression in Python's syntax; `.` does not match a line break unless it begins with `(?s)`.
        whole: match the whole completion instead of searching in it.
        equals: column of the row that the pattern's first group must equal, ignoring surrounding spaces, such as the
            letter of a multiple choice.
        right: score of a match.
        wrong: score without a match.
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
    """Check that a completion is `<think>...</think><answer>...</answer>`, or has other sections in order.

    Each section must appear once and hold text. Only white space may stand between, before and after sections.

    Args:
        sections: names of the tags.
        right: score of a completion in this format.
        wrong: score of any other completion.
    """

    def __init__(self, sections: Sequence[str] = ("think", "answer"), right: float = 1.0, wrong: float = 0.0) -> None:
        super().__init__()
        if not sections:
            raise ValueError("FormatReward needs at least one section")
        # A section contains none of these tags, so sections are neither nested nor repeated.
        tags = "|".join(f"</?{re.escape(name)}>" for name in sections)
        parts = (f"<{re.escape(name)}>((?:(?!{tags}).)*)</{re.escape(name)}>" for name in sections)
        self.pattern = re.compile(r"\s*" + r"\s*".join(parts) + r"\s*", re.DOTALL)
        self.right, self.wrong = right, wrong

    def score(self, row: dict[str, Any], text: str, completion: Completion) -> float:
        """See `TextReward`."""
        match = self.pattern.fullmatch(text)
        return self.right if match and all(inside.strip() for inside in match.groups()) else self.wrong


class LengthReward(TextReward):
    """Score the length n: 1 - |n / target - 1| (near), or -max(n / target - 1, 0) (below).

    Args:
        target: desired length (near) or maximum length (below).
        shape: near peaks at the target; below is 0 up to the target and falls beyond it.
        unit: tokens (without the stop token), words or characters.
        least: lowest score.

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
    """Compile a regular expression from a configuration.

    Raises:
        ValueError: it does not compile; says where it breaks.
    """
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{name} {pattern!r} is no regular expression: {error}") from error
