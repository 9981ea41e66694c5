"""The schema that every public format is read into, and the errors for rows that do not fit.

After reading, a row has one of these forms. Names are TRL's. `messages` is a list of {"role", "content"}, see
`data/messages.py`. A completion is text, or a message if it holds more than text. Any conversation may have `tools`.

    {"messages": [...]}                                    a conversation
    {"prompt": str | messages, "completion": str}          a prompt and its completion
    {"text": str}                                          plain text
    {"prompt": ..., "completions": [str], "ranks": [float]}    ranked completions, lower is better; optional `margins`,
                                                           `finished` (false: cut, so without a stop token),
                                                           `shares` of annotators who prefer the first of two
                                                           completions (12, 13, ... 23, ...), and `scores`
    {"prompt": ..., "reference"?: str, ...}                a prompt to sample from; other columns go to the reward
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

Row = dict[str, Any]

# Columns that make a row more than a prompt to sample from.
KINDS = ("messages", "completion", "text", "completions", "ranks", "margins", "finished")
# All columns about completions: beside sampled completions, they would judge the wrong ones.
JUDGEMENTS = (
    *KINDS, "chosen", "rejected", "rank", "margin", "share", "shares", "score", "scores", "score_chosen",
    "score_rejected", "label",
)  # fmt: skip

_SURROGATE = re.compile("[\ud800-\udfff]")


class BadField(ValueError):
    """A problem with one field of a row. The reader adds the file and the row number."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"field {field!r} {problem}")
        self.field = field
        self.problem = problem

    def inside(self, where: str) -> BadField:
        """The same problem with the field named as part of an outer one."""
        return BadField(f"{where}.{self.field}", self.problem)


def _brief(problem: object, room: int = 800) -> str:
    """Collapse to one line and shorten long text in the middle."""
    text = " ".join(str(problem).splitlines())
    return text if len(text) <= room else f"{text[: room // 2]} ... {text[-room // 2 :]}"


class BadRow(ValueError):
    """A row that cannot be used. The message gives place, field, problem and the way out."""

    def __init__(self, origin: str, row: int | str, problem: object) -> None:
        super().__init__(
            f"{origin}, row {row}: {_brief(problem)} (mend the row, or set on_bad_row: skip to count and leave out)"
        )


class BadFile(ValueError):
    """A file that cannot be read to its end. An error even if bad rows are skipped: the loss would be unknown."""

    def __init__(self, origin: str, where: str, problem: object) -> None:
        super().__init__(f"{origin}, {where}: {_brief(problem)}")


class Rows:
    """Base class of a user's own data source, named by class_path.

    A subclass takes plain arguments and implements `__iter__`. If it sets `fingerprint`, tokenised rows are cached; the
    fingerprint must change whenever the rows change.
    """

    fingerprint: str | None = None

    def __iter__(self) -> Iterator[Row]:
        raise NotImplementedError(f"{type(self).__name__} must implement __iter__")


class Tally(Counter[str]):
    """Counts of what happened to the rows of a source: read, used, skipped, truncated and so on.

    Attributes:
        first_skipped: the error of the first skipped row.
        languages: counts of how prompts were written: with the chat template or as text; see `data/strings.py`.
        columns: non-empty columns of the file; fields of turns as `messages[].role`.
        used: columns that a reader has read; see `data/watched.py`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.first_skipped: str | None = None
        self.languages: Counter[str] = Counter()
        self.columns: set[str] = set()
        self.used: set[str] = set()

    def skip(self, error: Exception) -> None:
        """Count a bad row that is left out (`on_bad_row: skip`), and keep the first error."""
        self["skipped"] += 1
        self.first_skipped = self.first_skipped or str(error)

    def write_down(self, written: str) -> None:
        """Count a prompt by the way it was written."""
        self.languages[written] += 1
        if written == "as it is":
            self["prompts_in_the_chat_template_already"] += 1

    def __str__(self) -> str:
        text = ", ".join(f"{count:,} {what.replace('_', ' ')}" for what, count in self.items() if count) or "no rows"
        return f"{text}; first skipped: {self.first_skipped}" if self.first_skipped else text


def text_of(row: Row, field: str, default: str | None = None) -> str:
    """Read a field that must hold text.

    Raises:
        BadField: the field is missing or null without a default, or is not text. Numbers are not converted.
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
