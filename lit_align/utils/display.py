r"""Escape untrusted text before it reaches a terminal, a model card or a report.

A model's completion, a server's status line, a file name or a field of a data set may hold escape sequences that move
the cursor, retitle the window or hide text, and marks that reverse the direction. They are shown as `\x1b`, `\u202e`.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import traceback
import unicodedata
import warnings
from types import TracebackType
from typing import Any

from lit_align.utils.secret import redact_text

# Format characters that are part of words in Persian or Hindi, and of emoji.
_JOINERS = "\u200c\u200d"
_HIDDEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}


def printable(text: object, lines: bool = False) -> str:
    """Escape control and invisible characters.

    Args:
        text: any object; `str` is applied.
        lines: keep line feeds and tabs.
    """
    text = str(text)
    if text.isascii() and text.isprintable():
        return text
    kept = _JOINERS + ("\n\t" if lines else "")
    return "".join(
        character if character in kept or unicodedata.category(character) not in _HIDDEN else _escaped(character)
        for character in text
    )


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode()


def say(text: object) -> None:
    """Print text, with control characters escaped and secrets redacted."""
    print(printable(redact_text(text), lines=True), flush=True)


def escape_record(record: logging.LogRecord) -> bool:
    """Logging filter that escapes a message and never drops it."""
    record.msg, record.args = printable(redact_text(record.getMessage()), lines=True), ()
    return True


def escape_the_rest() -> None:
    """Escape all logs, warnings and tracebacks of this process: libraries print untrusted text there too."""

    def show(message: Any, category: Any, filename: str, lineno: int, file: Any = None, line: Any = None) -> None:
        said = warnings.formatwarning(message, category, filename, lineno, line)
        print(printable(redact_text(said), lines=True), end="", file=file or sys.stderr)

    def fail(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        said = "".join(traceback.format_exception(kind, error, trace))
        print(printable(redact_text(said), lines=True), end="", file=sys.stderr)

    plain = logging.getLogRecordFactory()

    def record(*args: Any, **kwargs: Any) -> logging.LogRecord:
        made = plain(*args, **kwargs)
        with contextlib.suppress(Exception):  # the handler will report a malformed record
            escape_record(made)
        return made

    logging.setLogRecordFactory(record)
    warnings.showwarning = show
    sys.excepthook = fail
