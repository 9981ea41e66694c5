"""Limits on what is read: regular files only, and YAML that neither multiplies nor nests without end."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

# Larger than any configuration; a table of rows belongs in a data file.
MAX_BYTES = 4 << 20
MAX_VALUES = 100_000
MAX_JSON = 256 << 20  # what a run leaves of its figures
MAX_DEPTH = 100

_KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}
# What a value may name although it is no file: output that is shown or thrown away.
_STREAMS = {"/dev/null", "/dev/stdout", "/dev/stderr"}
# libyaml's scanner where PyYAML has it: ten times as quick.
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def kind(path: str | Path) -> str | None:
    """What lies at a path if it is no regular file: a folder, a named pipe, a socket or a device; None otherwise."""
    try:
        return _KINDS.get(stat.S_IFMT(os.stat(path).st_mode))
    except (OSError, ValueError):  # ValueError: a NUL in the name
        return None


def read_text(path: str | Path, largest: int = MAX_BYTES) -> str:
    """Text of a regular file.

    Args:
        path: the file; reading a pipe or a device may never end.
        largest: bytes that it may hold.

    Raises:
        OSError: there is no such file.
        ValueError: it is no regular file, too large, or not UTF-8; names it.
    """
    if found := kind(path):
        raise ValueError(f"{path} is {found}, expected a file")
    with open(path, "rb") as file:
        content = file.read(largest + 1)
    if len(content) > largest:
        raise ValueError(f"{path} holds more than {largest:,} bytes: is it the right file?")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start:,})") from error


def read_json(path: str | Path) -> dict[str, Any]:
    """The mapping that a JSON file of a run holds.

    Raises:
        OSError: there is no such file.
        ValueError: it is no regular file, not JSON, nested too deeply, or no mapping; names it.
    """
    try:
        content = json.loads(read_text(path, largest=MAX_JSON))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    except RecursionError as error:
        raise ValueError(f"{path} is not valid JSON: it is nested too deeply") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds {type(content).__name__}, expected a mapping")
    return content


def check_folder(folder: str | Path) -> None:
    """Refuse a folder with pipes, sockets or devices in it, whose reading may never end.

    Args:
        folder: what is no folder here, such as a name on the hub, is not looked at.

    Raises:
        ValueError: names the first of them.
    """
    names = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
    for name in names:
        if (found := kind(os.path.join(folder, name))) not in (None, "a folder"):
            raise ValueError(f"{os.path.join(folder, name)} is {found}, expected a file")


def load_yaml(text: str, where: object = "YAML") -> Any:
    """What YAML text holds.

    Args:
        text: one document.
        where: file or key, for messages.

    Raises:
        yaml.YAMLError: it is no YAML.
        ValueError: more values than `MAX_VALUES` or more bytes than `MAX_BYTES` once aliases are filled in, deeper than
            `MAX_DEPTH`, an alias inside what it stands for, or a number or date that Python has none for; names the
            line.
    """
    broken = None
    try:
        check_yaml(text, where)
    except yaml.YAMLError as error:  # PyYAML says better what is wrong with it than libyaml
        broken = error
    try:
        content = yaml.safe_load(text)
    except RecursionError as error:
        raise ValueError(f"{where}: nested more than {MAX_DEPTH} deep") from error
    except ValueError as error:  # a date such as 2024-13-45, a number of 5,000 digits
        raise ValueError(f"{where}: a value cannot be read: {error}") from error
    if broken is not None:
        raise broken
    return content


def check_yaml(text: str, where: object = "YAML") -> None:
    """Refuse YAML whose aliases multiply or that is nested too deeply, without building it; see `load_yaml`."""
    known: dict[str, _Node | None] = {}  # anchors; None while the node is open
    open_nodes = [_Node(None)]
    for event in yaml.parse(text, Loader=_LOADER):
        line = event.start_mark.line + 1 if event.start_mark else 0
        anchor = getattr(event, "anchor", None)
        if isinstance(event, (yaml.SequenceStartEvent, yaml.MappingStartEvent)):
            open_nodes.append(_Node(anchor, values=1))
            if anchor:
                known[anchor] = None
        elif isinstance(event, (yaml.SequenceEndEvent, yaml.MappingEndEvent)):
            closed = open_nodes.pop()
            if closed.anchor:
                known[closed.anchor] = closed
            open_nodes[-1].add(closed)
        elif isinstance(event, yaml.ScalarEvent):
            scalar = _Node(anchor, values=1, size=len(event.value))
            if anchor:
                known[anchor] = scalar
            open_nodes[-1].add(scalar)
        elif isinstance(event, yaml.AliasEvent) and anchor in known:
            held = known[anchor]
            if held is None:
                raise ValueError(f"{where}, line {line}: *{anchor} stands inside what it stands for")
            open_nodes[-1].add(held)
        values, size = sum(node.values for node in open_nodes), sum(node.size for node in open_nodes)
        if values > MAX_VALUES or size > MAX_BYTES:
            raise ValueError(
                f"{where}, line {line}: more than {MAX_VALUES:,} values or {MAX_BYTES:,} bytes, aliases filled in"
            )
        if len(open_nodes) + max(node.depth for node in open_nodes) > MAX_DEPTH:
            raise ValueError(f"{where}, line {line}: nested more than {MAX_DEPTH} deep")


class _Node:
    """A node of YAML with all that its aliases stand for."""

    __slots__ = ("anchor", "depth", "size", "values")

    def __init__(self, anchor: str | None, values: int = 0, size: int = 0) -> None:
        self.anchor, self.values, self.size, self.depth = anchor, values, size, 0

    def add(self, inner: _Node) -> None:
        """Put a node inside."""
        self.values += inner.values
        self.size += inner.size
        self.depth = max(self.depth, inner.depth + 1)


def no_files(content: Any, key: str = "") -> Iterator[str]:
    """Values that name a pipe, a socket or a device, each as a line: where a file is expected, reading it may hang.

    Args:
        content: mappings and lists, nested.
        key: where it stands, for the lines.
    """
    if isinstance(content, dict):
        for name, value in content.items():
            yield from no_files(value, f"{key}.{name}" if key else str(name))
    elif isinstance(content, list):
        for number, value in enumerate(content):
            yield from no_files(value, f"{key}[{number}]")
    elif isinstance(content, str) and 0 < len(content) < 4096 and content not in _STREAMS:
        found = kind(os.path.expanduser(os.path.expandvars(content)))
        if found not in (None, "a folder"):
            yield f"{key}: {content} is {found}, expected a file or a folder"
