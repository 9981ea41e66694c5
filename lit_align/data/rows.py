"""Rows of data: the one schema that every public format is read into, and what is wrong with a row that does not fit.

After reading, a row is one of (names as in TRL; `messages` is a list of {"role", "content"}, see `data/messages.py`;
an answer is text, or such a message where it holds more than text; `tools` may stand beside any conversation):

    {"messages": [...]}                                    a conversation
    {"prompt": str | messages, "completion": str}          a prompt and its answer
    {"text": str}                                          plain text
    {"prompt": ..., "completions": [str], "ranks": [float]}    ranked answers, lower is better; optional `margins`,
                                                           `finished` (false: cut, so without a stop token),
                                                           `shares` of several people who prefer the first of two
                                                           answers (12, 13, ... 23, ...) and `scores`, their grades
    {"prompt": ..., "reference"?: str, ...}                a prompt to answer; other columns go to the reward
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

Row = dict[str, Any]

# Columns that make a row of the schema more than a prompt to answer.
KINDS = ("messages", "completion", "text", "completions", "ranks", "margins", "finished")
# And all that a format reads of answers: beside other answers than those that were judged, it would judge these.
JUDGEMENTS = (
    *KINDS, "chosen", "rejected", "rank", "margin", "share", "shares", "score", "scores", "score_chosen",
    "score_rejected", "label",
)  # fmt: skip

_SURROGATE = re.compile("[\ud800-\udfff]")


class BadField(ValueError):
    """Something wrong with one field of a row; the reader that knows the file and the row number completes it."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"field {field!r} {problem}")
        self.field = field
        self.problem = problem

    def inside(self, where: str) -> BadField:
        """The same, of a field that lies inside another one."""
        return BadField(f"{where}.{self.field}", self.problem)


def _brief(problem: object, room: int = 800) -> str:
    """One line, without the middle of what a file of no use may hold as the name of a field."""
    text = " ".join(str(problem).splitlines())
    return text if len(text) <= room else f"{text[: room // 2]} ... {text[-room // 2 :]}"


class BadRow(ValueError):
    """A row that cannot be used: where it is, which field, what is wrong, and the way out."""

    def __init__(self, origin: str, row: int | str, problem: object) -> None:
        super().__init__(
            f"{origin}, row {row}: {_brief(problem)} (mend the row, or set on_bad_row: skip to count and leave out)"
        )


class BadFile(ValueError):
    """A file that cannot be read to its end: an error even where bad rows are skipped, for who knows what is lost."""

    def __init__(self, origin: str, where: str, problem: object) -> None:
        super().__init__(f"{origin}, {where}: {_brief(problem)}")


class Rows:
    """Base class of anything that yields rows: a user's own data source, reached by class_path.

    A subclass takes plain arguments and implements `__iter__`. With a `fingerprint` that changes whenever the rows
    would, what was tokenised is cached.
    """

    fingerprint: str | None = None

    def __iter__(self) -> Iterator[Row]:
        raise NotImplementedError(f"{type(self).__name__} must implement __iter__")


class Tally(Counter[str]):
    """What happened to the rows of a source: how many were read, used, skipped, truncated ..., and the first reason.

    Attributes:
        first_skipped: why the first bad row was left out.
        languages: how prompts were written: by the chat template, as text; see `data/strings.py`.
        columns: names of the file's columns that hold something; those of turns as `messages[].role`.
        used: those that a reader has asked for; see `data/watched.py`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.first_skipped: str | None = None
        self.languages: Counter[str] = Counter()
        self.columns: set[str] = set()
        self.used: set[str] = set()

    def skip(self, error: Exception) -> None:
        """Count a bad row that the user allowed to leave out, and remember the first."""
        self["skipped"] += 1
        self.first_skipped = self.first_skipped or str(error)

    def write_down(self, written: str) -> None:
        """Count a prompt by how it was written."""
        self.languages[written] += 1
        if written == "as it is":
            self["prompts_in_the_chat_template_already"] += 1

    def __str__(self) -> str:
        text = ", ".join(f"{count:,} {what.replace('_', ' ')}" for what, count in self.items() if count) or "no rows"
        return f"{text}; first skipped: {self.first_skipped}" if self.first_skipped else text


def text_of(row: Row, field: str, default: str | None = None) -> str:
    """The text in a field.

    Raises:
        BadField: missing or null (without a default), or not text. Numbers are not turned into text behind the user's
            back.
    """
    value = row.get(field)
    if value is None:
        if default is not None:
            return default
        raise BadField(field, "is null" if field in row else missing(row))
    if not isinstance(value, str):
        raise BadField(field, f"is {type(value).__name__} ({value!r:.40}), expected text")
    if not value.isascii() and _SURROGATE.search(value):  # no tokenizer takes it
        raise BadField(field, "is not valid Unicode: it holds bytes that are no UTF-8, or half of a surrogate pair")
    return value


def missing(row: Row) -> str:
    """What is wrong with a row that lacks a field."""
    return f"is missing; the row has {', '.join(map(repr, row)) or 'no fields'}"


def filled(row: Row, field: str) -> str:
    """The text in a field that must say something.

    Raises:
        BadField: missing, not text, or blank.
    """
    value = text_of(row, field)
    if not value.strip():
        raise BadField(field, "is empty")
    return value


def number_of(row: Row, field: str) -> float:
    """The finite number in a field.

    Raises:
        BadField: missing, not a number, or one that no arithmetic survives.
    """
    value = row.get(field)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise BadField(field, f"is {type(value).__name__} ({value!r:.40}), expected a number")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise BadField(field, f"is {value!r:.40}, expected a finite number")
    return number


def list_of(row: Row, field: str) -> list[Any]:
    """The non-empty list in a field.

    Raises:
        BadField: missing, not a list, or empty.
    """
    value = row.get(field)
    if field not in row:
        raise BadField(field, missing(row))
    if not isinstance(value, list):
        raise BadField(field, f"is {type(value).__name__}, expected a list")
    if not value:
        raise BadField(field, "is an empty list")
    return value


def user(text: str) -> list[dict[str, Any]]:
    """A conversation of one user turn."""
    return [{"role": "user", "content": text}]
