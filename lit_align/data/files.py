"""Raw rows out of files: json, jsonl, csv, parquet and plain text, compressed or inside an archive, with row numbers.

Paths are fsspec's: a glob, `name.gz`, or a member of an archive as `zip://folder/*.csv::archive.zip`. Nothing is ever
extracted to disk.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Callable, Iterator
from typing import IO, Any

import fsspec

from lit_align.data.rows import BadRow, Row


def expand(path: str) -> str:
    """Fill in environment variables and ~.

    Raises:
        ValueError: a variable that is not set.
    """
    expanded = os.path.expanduser(os.path.expandvars(path))
    unset = re.search(r"\$\{?(\w+)\}?", expanded)
    if unset:
        raise ValueError(f"path {path!r} needs the environment variable {unset[1]}, which is not set")
    return expanded


def open_files(path: str) -> list[tuple[str, Any]]:
    """The files behind a path, each with its name and an fsspec handle to open.

    Raises:
        ValueError: no such file.
    """
    path = expand(path)
    try:
        handles = fsspec.open_files(path, mode="rb", compression="infer")
        found = [(handle.path, handle) for handle in handles if handle.fs.isfile(handle.path)]
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot open {path!r}: {error}") from error
    if not found:
        raise ValueError(f"no file matches {path!r}")
    return sorted(found, key=lambda item: item[0])


def read_rows(name: str, handle: Any, header: list[str] | None = None) -> Iterator[tuple[int, Row | BadRow]]:
    """Rows of a file, each with its number (from 1; the line number where a row is a line).

    A row that cannot be read comes out as a `BadRow`, so that the caller decides whether to stop or to count it. What
    makes the rest of the file unreadable (a truncated archive, a broken json list) is raised.

    Args:
        name: path, whose ending tells the format.
        handle: fsspec handle.
        header: column names of a csv without a header line.

    Raises:
        BadRow: the file as a whole cannot be read.
    """
    kind = name.removesuffix(".gz").removesuffix(".bz2").removesuffix(".xz").rsplit(".", 1)[-1].lower()
    if kind not in _READERS:
        raise ValueError(f"{name!r} is none of {', '.join(_READERS)} (.gz, .bz2 and .xz included)")
    try:
        with handle as raw:
            yield from _READERS[kind](name, raw, header)
    except (OSError, EOFError, UnicodeDecodeError, csv.Error) as error:
        raise BadRow(name, "unknown", f"the file cannot be read: {error}") from error


def _text(raw: IO[bytes]) -> io.TextIOWrapper:
    # utf-8-sig: a byte order mark is not part of the first key.
    return io.TextIOWrapper(raw, encoding="utf-8-sig", newline="")


def _read_json(name: str, raw: IO[bytes], header: list[str] | None) -> Iterator[tuple[int, Row | BadRow]]:
    content = _text(raw).read()
    try:
        rows = json.loads(content)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # one object after another: json lines under the name json
            yield from _json_lines(name, content.splitlines())
            return
        raise BadRow(name, f"at line {error.lineno}", f"not valid json: {error.msg}") from error
    if not isinstance(rows, list):
        raise BadRow(name, 1, f"the file holds {type(rows).__name__}, expected a list of rows")
    for number, row in enumerate(rows, start=1):
        yield number, _checked(name, number, row)


def _read_jsonl(name: str, raw: IO[bytes], header: list[str] | None) -> Iterator[tuple[int, Row | BadRow]]:
    yield from _json_lines(name, _text(raw))


def _json_lines(name: str, lines: Any) -> Iterator[tuple[int, Row | BadRow]]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            yield number, BadRow(name, number, f"not valid json: {error}")
            continue
        yield number, _checked(name, number, row)


def _checked(name: str, number: int, row: object) -> Row | BadRow:
    return row if isinstance(row, dict) else BadRow(name, number, f"is {type(row).__name__}, expected an object")


def _read_csv(name: str, raw: IO[bytes], header: list[str] | None) -> Iterator[tuple[int, Row | BadRow]]:
    reader = csv.reader(_text(raw))
    columns = header if header is not None else next(reader, [])
    for number, cells in enumerate(reader, start=1 if header is not None else 2):
        if not cells:
            continue
        if len(cells) != len(columns):
            yield number, BadRow(name, number, f"has {len(cells)} cells for {len(columns)} columns")
            continue
        yield number, dict(zip(columns, cells, strict=True))


def _read_parquet(name: str, raw: IO[bytes], header: list[str] | None) -> Iterator[tuple[int, Row | BadRow]]:
    import pyarrow.parquet  # comes with datasets; slow to import

    try:
        file = pyarrow.parquet.ParquetFile(io.BytesIO(raw.read()))
    except pyarrow.ArrowException as error:
        raise BadRow(name, "unknown", f"not valid parquet: {error}") from error
    number = 0
    for batch in file.iter_batches():
        for row in batch.to_pylist():
            number += 1
            yield number, row


def _read_text(name: str, raw: IO[bytes], header: list[str] | None) -> Iterator[tuple[int, Row | BadRow]]:
    """Plain text: a row for each block between blank lines, numbered by its first line."""
    block: list[str] = []
    for number, line in enumerate(_text(raw), start=1):
        if line.strip():
            block.append(line)
        elif block:
            yield number - len(block), {"text": "".join(block).strip()}
            block = []
    if block:
        yield number - len(block) + 1, {"text": "".join(block).strip()}


_READERS: dict[str, Callable[[str, IO[bytes], list[str] | None], Iterator[tuple[int, Row | BadRow]]]] = {
    "json": _read_json,
    "jsonl": _read_jsonl,
    "csv": _read_csv,
    "parquet": _read_parquet,
    "txt": _read_text,
}
