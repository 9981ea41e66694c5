"""Limits on input: regular files only, and YAML of bounded size and depth after its aliases are expanded."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

# Larger than any configuration; rows belong in a data file.
MAX_BYTES = 4 << 20
MAX_VALUES = 100_000
MAX_JSON = 256 << 20  # for files of figures that a run writes
MAX_DEPTH = 100

_KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}
# Device names that are allowed as values, because output may go there.
_STREAMS = {"/dev/null", "/dev/stdout", "/dev/stderr"}
# libyaml's scanner, if PyYAML was built with it, is ten times faster.
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def kind(path: str | Path) -> str | None:
    """Kind of a path that is not a regular file: folder, named pipe, socket or device; None for all others."""
    try:
        return _KINDS.get(stat.S_IFMT(os.stat(path).st_mode))
    except (OSError, ValueError):  # ValueError: a NUL in the name
        return None


def read_text(path: str | Path, largest: int = MAX_BYTES) -> str:
    """Read the text of a regular file. Pipes and devices are refused: reading them may never end.

    Args:
        path: the file.
        largest: maximum size in bytes.

    Raises:
        OSError: the file does not exist.
        ValueError: it is not a regular file, too large, or not UTF-8; names the file.
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
    """Read a JSON file of a run, which must hold a mapping.

    Raises:
        OSError: the file does not exist.
        ValueError: it is not a regular file, not JSON, nested too deeply, or not a mapping; names the file.
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
    """Refuse a folder that holds pipes, sockets or devices: reading them may never end.

    Args:
        folder: a folder; anything else, such as a name on the hub, is ignored.

    Raises:
        ValueError: names the first such entry.
    """
    names = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
    for name in names:
        if (found := kind(os.path.join(folder, name))) not in (None, "a folder"):
            raise ValueError(f"{os.path.join(folder, name)} is {found}, expected a file")


def load_yaml(text: str, where: object = "YAML") -> Any:
    """Parse YAML within limits.

    Args:
        text: one document.
        where: file or key, for messages.

    Raises:
        yaml.YAMLError: the text is not YAML.
        ValueError: a key that is given twice, more than `MAX_VALUES` values or `MAX_BYTES` bytes after aliases are
            expanded, nested deeper than `MAX_DEPTH`, an alias inside its own anchor, or a number or date that Python
            cannot represent; names the line.
    """
    broken = None
    try:
        check_yaml(text, where)
    except yaml.YAMLError as error:  # the pure Python parser below has the better message
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
    """Check the limits of `load_yaml` on the event stream, without building any value."""
    known: dict[str, _Node | None] = {}  # anchors; None while the node is open
    open_nodes = [_Node(None)]
    for event in yaml.parse(text, Loader=_LOADER):
        line = event.start_mark.line + 1 if event.start_mark else 0
        anchor = getattr(event, "anchor", None)
        if isinstance(event, (yaml.SequenceStartEvent, yaml.MappingStartEvent)):
            keys: set[str] | None = set() if isinstance(event, yaml.MappingStartEvent) else None
            open_nodes[-1].check_key(None, where, line)
            open_nodes.append(_Node(anchor, values=1, keys=keys))
            if anchor:
                known[anchor] = None
        elif isinstance(event, (yaml.SequenceEndEvent, yaml.MappingEndEvent)):
            closed = open_nodes.pop()
            if closed.anchor:
                known[closed.anchor] = closed
            open_nodes[-1].add(closed)
        elif isinstance(event, yaml.ScalarEvent):
            open_nodes[-1].check_key(event.value, where, line)
            scalar = _Node(anchor, values=1, size=len(event.value))
            if anchor:
                known[anchor] = scalar
            open_nodes[-1].add(scalar)
        elif isinstance(event, yaml.AliasEvent) and anchor in known:
            open_nodes[-1].check_key(None, where, line)
            held = known[anchor]
            if held is None:
                raise ValueError(f"{where}, line {line}: the alias *{anchor} is inside its own anchor")
            open_nodes[-1].add(held)
        values, size = sum(node.values for node in open_nodes), sum(node.size for node in open_nodes)
        if values > MAX_VALUES or size > MAX_BYTES:
            raise ValueError(
                f"{where}, line {line}: more than {MAX_VALUES:,} values or {MAX_BYTES:,} bytes with aliases expanded"
            )
        if len(open_nodes) + max(node.depth for node in open_nodes) > MAX_DEPTH:
            raise ValueError(f"{where}, line {line}: nested more than {MAX_DEPTH} deep")


class _Node:
    """Size and depth of a YAML node with its aliases expanded."""

    __slots__ = ("anchor", "children", "depth", "keys", "size", "values")

    def __init__(self, anchor: str | None, values: int = 0, size: int = 0, keys: set[str] | None = None) -> None:
        self.anchor, self.values, self.size, self.depth = anchor, values, size, 0
        self.keys, self.children = keys, 0  # of a mapping: keys and values alternate

    def check_key(self, text: str | None, where: object, line: int) -> None:
        """Count a child; refuse a key of a mapping that is there already: YAML would drop its first value."""
        self.children += 1
        if self.keys is None or self.children % 2 == 0 or text is None or text == "<<":
            return
        if text in self.keys:
            raise ValueError(f"{where}, line {line}: the key {text!r:.80} is given twice: remove one")
        self.keys.add(text)

    def add(self, inner: _Node) -> None:
        """Add a child node."""
        self.values += inner.values
        self.size += inner.size
        self.depth = max(self.depth, inner.depth + 1)


def no_files(content: Any, key: str = "") -> Iterator[str]:
    """Yield a line for each value that names a pipe, a socket or a device: reading it as a file may hang.

    Args:
        content: nested mappings and lists.
        key: dotted key of the content, for the lines.
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
