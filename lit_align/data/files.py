"""Raw rows out of files: json, jsonl, csv, parquet and plain text, compressed or inside an archive, with row numbers.

Paths are fsspec's: a glob, `name.gz`, or a member of an archive as `zip://folder/*.csv::archive.zip`. Nothing is ever
extracted to disk.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import lzma
import os
import re
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import IO, Any

import fsspec

from lit_align.data.rows import BadFile, BadRow, Row
from lit_align.data.unpacked import LONGEST_ROW, bounded, check_parquet, check_unpacked
from lit_align.data.unpacked import lines as bounded_lines
from lit_align.utils.secret import REDACTED, WAY_OUT, redact_text

# What unpacking and decoding raise when a file is damaged; most of it is no OSError.
_DAMAGED = (OSError, EOFError, UnicodeError, csv.Error, zlib.error, lzma.LZMAError, zipfile.BadZipFile)


def expand(path: str) -> str:
    """Fill in environment variables and ~.

    Raises:
        ValueError: a variable that is not set.
    """
    if REDACTED in path:
        raise ValueError(f"{path!r} was written without its secret: {WAY_OUT}")
    expanded = os.path.expanduser(os.path.expandvars(path))
    unset = re.search(r"\$\{?(\w+)\}?", expanded)
    if unset:
        raise ValueError(f"path {path!r} needs the environment variable {unset[1]}, which is not set")
    return expanded


def open_files(path: str, compression: str | None = "infer") -> list[tuple[str, Any]]:
    """The files behind a path, each with its name and an fsspec handle to open.

    Raises:
        ValueError: no such file.
    """
    shown, path = redact_text(path), expand(path)
    try:
        handles = fsspec.open_files(path, mode="rb", compression=compression)
        found = [(handle.path, handle) for handle in handles if handle.fs.isfile(handle.path)]
    except (*_DAMAGED, ValueError, ImportError) as error:
        raise ValueError(f"cannot open {shown!r}: {redact_text(error)}") from error
    if not found:
        raise ValueError(f"no file matches {shown!r}")
    return sorted(found, key=lambda item: item[0])


def read_bytes(path: str) -> Iterator[bytes]:
    """Names and contents of the files behind a path, not decompressed: what a fingerprint is made of."""
    for name, handle in open_files(path, compression=None):
        yield os.path.basename(name).encode()
        with _opened(name, handle) as raw:
            while block := raw.read(1 << 20):
                yield block


def read_rows(name: str, handle: Any, header: list[str] | None = None) -> Iterator[tuple[int, Row | BadRow]]:
    """Rows of a file, each with its number, from 1: the line in jsonl and text, in csv the row as a spreadsheet counts.

    A row that cannot be read comes out as a `BadRow`, so that the caller decides whether to stop or to count it. What
    makes the rest of the file unreadable (a truncated archive, a broken json list) is raised.

    Args:
        name: path, whose ending tells the format.
        handle: fsspec handle.
        header: column names of a csv without a header line.

    Raises:
        BadFile: the rest of the file cannot be read.
        ValueError: no known ending.
    """
    kind = name.removesuffix(".gz").removesuffix(".bz2").removesuffix(".xz").rsplit(".", 1)[-1].lower()
    if kind not in _READERS:
        raise ValueError(f"{name!r} is none of {', '.join(_READERS)} (.gz, .bz2 and .xz included)")
    with _opened(name, handle) as raw:
        yield from _READERS[kind](name, raw if kind == "parquet" else bounded(name, handle, raw), header)


@contextlib.contextmanager
def _opened(name: str, handle: Any) -> Iterator[Any]:
    try:
        with handle as raw:
            yield raw
    except _DAMAGED as error:
        raise BadFile(name, "the file cannot be read to its end", error) from error


def _text(raw: IO[bytes]) -> io.TextIOWrapper:
    # utf-8-sig: a byte order mark is not part of the first key. Bytes that are no UTF-8 become lone surrogates, which
    # `text_of` refuses: an error of one field of one row, and not of the whole file.
    return io.TextIOWrapper(raw, encoding="utf-8-sig", errors="surrogateescape", newline="")


def _read_json(name: str, raw: IO[bytes], header: list[str] | None) -> Iterator[tuple[int, Row | BadRow]]:
    with _text(raw) as text:
        content = text.read()
    try:
        rows = json.loads(content)
    except (ValueError, RecursionError) as error:
        lines = io.StringIO(content)
        if _is_object(next((line for line in lines if line.strip()), "")):  # json lines under the name json
            lines.seek(0)
            yield from _json_lines(name, lines)
            return
        raise BadFile(name, "the file as a whole", f"not valid json: {error}") from error
    if not isinstance(rows, list):
        raise BadFile(name, "the file as a whole", f"holds {type(rows).__name__}, expected a list of rows")
    for number, row in enumerate(rows, start=1):
        yield number, _checked(name, number, row)


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _read_jsonl(name: str, raw: IO[bytes], header: list[str] | None) -> Iterator[tuple[int, Row | BadRow]]:
    with _text(raw) as lines:
        yield from _json_lines(name, bounded_lines(name, lines))


def _json_lines(name: str, lines: Iterable[str]) -> Iterator[tuple[int, Row | BadRow]]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:  # ValueError alone: a number of more than 4,300 digits
            yield number, BadRow(name, number, f"not valid json: {error}")
            continue
        yield number, _checked(name, number, row)


def _checked(name: str, number: int, row: object) -> Row | BadRow:
    return row if isinstance(row, dict) else BadRow(name, number, f"is {type(row).__name__}, expected an object")


def _read_csv(name: str, raw: IO[bytes], header: list[str] | None) -> Iterator[tuple[int, Row | BadRow]]:
    with _text(raw) as lines:
        # strict: a quote that is never closed is an error, and does not swallow the rest of the file.
        reader = csv.reader(bounded_lines(name, lines), strict=True)
        columns = header if header is not None else next(reader, [])
        if len(set(columns)) < len(columns):
            raise BadFile(name, "row 1", f"a column name comes twice in {', '.join(map(repr, columns))}")
        number = 0 if header is not None else 1
        while True:
            number += 1
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield number, BadRow(name, number, f"not valid csv: {error}")
                continue
            if len(cells) == len(columns):
                yield number, dict(zip(columns, cells, strict=True))
            elif cells:  # not a blank line
                yield number, BadRow(name, number, f"has {len(cells)} cells for {len(columns)} columns")


def _read_parquet(name: str, raw: IO[bytes], header: list[str] | None) -> Iterator[tuple[int, Row | BadRow]]:
    import pyarrow.parquet  # comes with datasets; slow to import

    number = 0
    try:
        file = pyarrow.parquet.ParquetFile(raw)
        limit, read = check_parquet(name, file.metadata), 0
        for batch in file.iter_batches(batch_size=16):  # a word of a dictionary page may stand in each row
            columns = (c.dictionary_decode() if pyarrow.types.is_dictionary(c.type) else c for c in batch.columns)
            read += sum(column.nbytes for column in columns)
            check_unpacked(name, read, limit)
            for row in batch.to_pylist():
                number += 1
                yield number, row
    except pyarrow.ArrowException as error:
        raise BadFile(name, f"after row {number}", f"not valid parquet: {error}") from error


def _read_text(name: str, raw: IO[bytes], header: list[str] | None) -> Iterator[tuple[int, Row | BadRow]]:
    """Plain text: a row for each block between blank lines, numbered by its first line."""
    block: list[str] = []
    number = size = 0
    with _text(raw) as lines:
        for number, line in enumerate(bounded_lines(name, lines), start=1):
            size = size + len(line) if block else len(line)
            if size > LONGEST_ROW:
                raise BadFile(name, f"line {number}", f"ends a block of more than {LONGEST_ROW:,} characters")
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
