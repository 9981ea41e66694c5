"""Rows of data: the one schema that every public format is read into, and what is wrong with a row that does not fit.

After reading, a row is one of (names as in TRL; `messages` is a list of {"role", "content"}):

    {"messages": [...]}                                    a conversation
    {"prompt": str | messages, "completion": str}          a prompt and its answer
    {"text": str}                                          plain text
    {"prompt": ..., "completions": [str], "ranks": [float]}    ranked answers, lower is better; optional `margins`
                                                           and `finished` (false: cut, so without a stop token)
    {"prompt": ..., "reference"?: str, ...}                a prompt to answer; other columns go to the reward
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

Row = dict[str, Any]
ROLES = ("system", "user", "assistant", "tool")


class BadField(ValueError):
    """Something wrong with one field of a row; the reader that knows the file and the row number completes it."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"field {field!r} {problem}")


class BadRow(ValueError):
    """A row that cannot be used: where it is, which field, what is wrong, and the way out."""

    def __init__(self, origin: str, row: int | str, problem: object) -> None:
        super().__init__(
            f"{origin}, row {row}: {problem} (mend the row, or set on_bad_row: skip to count and leave out)"
        )


class Rows:
    """Base class of anything that yields rows: a user's own data source, reached by class_path.

    A subclass takes plain arguments and implements `__iter__`. With a `fingerprint` that changes whenever the rows
    would, what was tokenised is cached.
    """

    fingerprint: str | None = None

    def __iter__(self) -> Iterator[Row]:
        raise NotImplementedError(f"{type(self).__name__} must implement __iter__")


class Tally(Counter[str]):
    """What happened to the rows of a source: how many were read, used, skipped, truncated ..., and the first reason."""

    def __init__(self) -> None:
        super().__init__()
        self.first_skipped: str | None = None

    def skip(self, error: Exception) -> None:
        """Count a bad row that the user allowed to leave out, and remember the first."""
        self["skipped"] += 1
        self.first_skipped = self.first_skipped or str(error)

    def __str__(self) -> str:
        text = ", ".join(f"{count:,} {what.replace('_', ' ')}" for what, count in self.items() if count)
        return f"{text}; first skipped: {self.first_skipped}" if self.first_skipped else text


def text_of(row: Row, field: str, default: str | None = None) -> str:
    """The text in a field.

    Raises:
        BadField: missing (without a default), or not text. Numbers are not turned into text behind the user's back.
    """
    value = row.get(field)
    if value is None:
        if default is not None:
            return default
        raise BadField(field, f"is missing; the row has {', '.join(map(repr, row)) or 'no fields'}")
    if not isinstance(value, str):
        raise BadField(field, f"is {type(value).__name__} ({value!r:.40}), expected text")
    return value


def filled(row: Row, field: str) -> str:
    """The text in a field that must say something.

    Raises:
        BadField: missing, not text, or blank.
    """
    value = text_of(row, field)
    if not value.strip():
        raise BadField(field, "is empty")
    return value


def list_of(row: Row, field: str) -> list[Any]:
    """The non-empty list in a field.

    Raises:
        BadField: missing, not a list, or empty.
    """
    value = row.get(field)
    if not isinstance(value, list):
        raise BadField(field, f"is {type(value).__name__}, expected a list")
    if not value:
        raise BadField(field, "is an empty list")
    return value


def messages_of(row: Row, field: str) -> list[dict[str, str]]:
    """The conversation in a field, checked turn by turn.

    Raises:
        BadField: a turn without a known role or without text.
    """
    messages = []
    for i, turn in enumerate(list_of(row, field)):
        where = f"{field}[{i}]"
        if not isinstance(turn, dict):
            raise BadField(where, f"is {type(turn).__name__}, expected a message with role and content")
        role = turn.get("role")
        if role not in ROLES:
            raise BadField(f"{where}.role", f"is {role!r}, expected one of {', '.join(ROLES)}")
        content = turn.get("content")
        if not isinstance(content, str):
            raise BadField(f"{where}.content", f"is {type(content).__name__}, expected text")
        messages.append({"role": role, "content": content})
    return messages


def prompt_of(row: Row, field: str = "prompt") -> str | list[dict[str, str]]:
    """A prompt: text, or a conversation that ends before the assistant speaks.

    Raises:
        BadField: missing, empty, or ending with the assistant.
    """
    if not isinstance(row.get(field), list):
        return filled(row, field)
    messages = messages_of(row, field)
    if messages[-1]["role"] == "assistant":
        raise BadField(field, "ends with an assistant turn, which is an answer and not a prompt")
    return messages


def user(text: str) -> list[dict[str, str]]:
    """A conversation of one user turn."""
    return [{"role": "user", "content": text}]
