r"""Text from elsewhere on its way to a terminal, a card or a report: no byte of it commands the terminal.

A model's answer, a server's status line, a file's name or a field of a data set may hold escape sequences that move the
cursor, retitle the window or hide text, and marks that turn its direction around. They are shown as `\x1b`, `\u202e`.
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

# Joiners: format characters that belong to words of Persian or Hindi, and to emoji.
_JOINERS = "\u200c\u200d"
_HIDDEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}


def printable(text: object, lines: bool = False) -> str:
    """The text with control and invisible characters escaped.

    Args:
        text: anything; its `str` is taken.
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
    """Print lines of text, escaped."""
    print(printable(redact_text(text), lines=True), flush=True)


def escape_record(record: logging.LogRecord) -> bool:
    """A filter for loggers: the message escaped, and never left out."""
    record.msg, record.args = printable(redact_text(record.getMessage()), lines=True), ()
    return True


def escape_the_rest() -> None:
    """Escape logs, warnings and tracebacks of this process, which print texts of whoever raises them."""

    def show(message: Any, category: Any, filename: str, lineno: int, file: Any = None, line: Any = None) -> None:
        said = warnings.formatwarning(message, category, filename, lineno, line)
        print(printable(redact_text(said), lines=True), end="", file=file or sys.stderr)

    def fail(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        said = "".join(traceback.format_exception(kind, error, trace))
        print(printable(redact_text(said), lines=True), end="", file=sys.stderr)

    plain = logging.getLogRecordFactory()

    def record(*args: Any, **kwargs: Any) -> logging.LogRecord:
        made = plain(*args, **kwargs)
        with contextlib.suppress(Exception):  # its handler says what is wrong with it
            escape_record(made)
        return made

    logging.setLogRecordFactory(record)
    warnings.showwarning = show
    sys.excepthook = fail
