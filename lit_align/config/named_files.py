"""The configuration files that a command line names, checked before anything slow is imported."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from pathlib import Path

import yaml

from lit_align.config.errors import ConfigError
from lit_align.utils import limits

# What YAML takes in no value.
_NO_YAML = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\ud800-\udfff\ufffe\uffff]")


def config_files(words: list[str]) -> Iterator[Path]:
    """What follows `-c` in a command."""
    for flag, value in itertools.pairwise([*words, ""]):
        joined = re.fullmatch(r"(?:--config=|-c)(.+)", flag)
        name = joined[1] if joined else value if flag in ("-c", "--config") else ""
        if name:
            yield Path(name)


def check_files(words: list[str]) -> None:
    """Refuse a command line whose configuration files are missing or are not YAML.

    Raises:
        ConfigError: names the file.
    """
    for word in filter(_NO_YAML.search, words):
        raise ConfigError(f"{word!r:.100}: control characters and bytes that are no UTF-8 cannot be given here")
    files = config_files(words)
    if words[:1] == ["doctor"] and words[1:] and not words[1].startswith("-"):
        files = itertools.chain([Path(words[1])], files)
    for file in files:
        if file.is_file():
            check_syntax(file)
        elif found := limits.kind(file):
            raise ConfigError(f"config: Expected a file, got {found}: {file}")
        elif not _is_content(str(file)):
            raise ConfigError(f"config: File does not exist: {file}")
    for word in words:
        for line in limits.no_files(word.partition("=")[2] or word, word.partition("=")[0]):
            raise ConfigError(line)


def _is_content(text: str) -> bool:
    """Whether `-c` is followed by YAML itself, which jsonargparse takes as well as a file."""
    try:
        return isinstance(limits.load_yaml(text, "config"), dict)
    except yaml.YAMLError:
        return False


def check_syntax(file: Path) -> None:
    """Refuse a file that is not a YAML mapping, names a pipe or a device as a file, or sets `weights_only: false`.

    Raises:
        ConfigError: names the file and the line.
    """
    try:
        content = limits.load_yaml(limits.read_text(file), file)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = " ".join(str(getattr(error, "problem", error)).split())
        raise ConfigError(f"{file}{line}: not valid YAML: {problem}") from error
    if not isinstance(content, dict):
        held = "nothing" if content is None else type(content).__name__
        raise ConfigError(f"{file} holds {held}, expected a mapping with the keys of a configuration")
    for line in limits.no_files(content):
        raise ConfigError(f"{file}: {line}")
    for part in (content, *(content.get(command) for command in ("fit", "validate", "test", "predict"))):
        if isinstance(part, dict) and part.get("weights_only") is False:
            raise ConfigError(
                f"{file}: weights_only: false lets a checkpoint run code, so a file cannot set it: remove the key, and "
                "give --weights_only false on the command line if you trust the checkpoint"
            )
