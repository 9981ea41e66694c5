"""A list on the command line, or in a later configuration file, replaces the one before it.

jsonargparse merges the items of two lists of one length by position: a new source would inherit `limit` and `format` of
the old one. So an empty list goes before every list that is given again, and there is nothing to merge with.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from lit_align.utils import limits

# Keys whose value may be the name of a file that holds it.
_IN_FILES = ("model", "data", "trainer", "checkpoint")


def replace_lists(words: list[str]) -> list[str]:
    """Command line with `--KEY=[]` before each list that an earlier file or argument has given.

    `--KEY+=...`, which appends, stays as it is.

    Args:
        words: command line of a LightningCLI command, without the program's name.
    """
    earlier: dict[tuple[str, ...], type] = {}
    replaced: list[str] = []
    for key, value, given in _arguments(words):
        for path, dotted, kind in _values(key, value):
            # A text, or the keys of one item, may be short for a list.
            if path in earlier and list in (earlier[path], kind):
                replaced.append(f"--{dotted}=[]")
                earlier = {other: held for other, held in earlier.items() if other[: len(path)] != path}
            earlier[path] = kind
        replaced += given
    return replaced


def _arguments(words: list[str]) -> Iterator[tuple[str, Any, list[str]]]:
    """Each argument as its dotted key, empty for a file; its value; and its words."""
    number = 0
    while number < len(words):
        word = words[number]
        flag, equals, value = word.partition("=")
        given = [word]
        if word.startswith("-c") and not word.startswith("--") and len(word) > 2:
            flag, value = "-c", word[2:].removeprefix("=")
        elif word.startswith("-") and not equals and number + 1 < len(words) and not words[number + 1].startswith("-"):
            value = words[number + 1]
            given.append(value)
        number += len(given)
        if flag in ("-c", "--config"):
            yield "", _file_or_content(value), given
        elif flag.startswith("--"):
            yield flag.removeprefix("--"), _content(value), given
        else:
            yield "", None, given


def _values(key: str, value: Any) -> Iterator[tuple[tuple[str, ...], str, type]]:
    """Every value that is not inside a list, as path without `init_args`, dotted key, and type."""
    if key in _IN_FILES and isinstance(value, str) and value.endswith((".yaml", ".yml", ".json")):
        value = _file_or_content(value)
    if key and not key.endswith("+"):
        yield tuple(part for part in key.split(".") if part != "init_args"), key, type(value)
    if isinstance(value, dict):
        for name, item in value.items():
            yield from _values(f"{key}.{name}" if key else str(name), item)


def _file_or_content(text: str) -> Any:
    return _content(limits.read_text(text)) if Path(text).is_file() else _content(text)


def _content(text: str) -> Any:
    try:
        return limits.load_yaml(text, "a value of the command line")
    except yaml.YAMLError:  # jsonargparse says what is wrong with it
        return None
