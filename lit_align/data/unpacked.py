"""What a file may unpack to: a megabyte of zeros can stand for gigabytes."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from typing import Any, TextIO

from lit_align.data.rows import BadFile

# Text is packed to a tenth of its size, very regular rows to a hundredth; only made-up files go far beyond.
RATIO = 200
AT_LEAST = 256 << 20
# The longest line, or block of plain text, in characters.
LONGEST_ROW = 64 << 20
OPTION = "LIT_ALIGN_UNPACK_GIB"


def bounded(name: str, handle: Any, raw: Any) -> Any:
    """A stream that ends with an error where a packed file unpacks to more than it should.

    Args:
        name: the file's, for the error.
        handle: fsspec's handle of it.
        raw: the opened stream, unpacked.
    """
    limit = largest(handle)
    return raw if limit is None else io.BufferedReader(_Bounded(name, raw, limit), 1 << 16)


def largest(handle: Any) -> int | None:
    """Bytes that a file may unpack to; None where it is not packed."""
    try:
        info = handle.fs.info(handle.path)
    except (OSError, ValueError, KeyError):
        info = {}
    packed = info.get("compress_size") or info.get("size")  # the first is of a member of a zip archive
    if handle.compression is None and "compress_size" not in info:
        return None
    return _asked() or max(AT_LEAST, RATIO * int(packed or 0))


def check_parquet(name: str, metadata: Any) -> int:
    """Refuse a parquet file whose columns unpack to more than they should, by what its footer says.

    Args:
        name: the file's, for the error.
        metadata: pyarrow's.

    Returns:
        Bytes that its rows may hold. The footer counts a word of a dictionary once, however many rows have it.

    Raises:
        BadFile: see above.
    """
    columns = [
        metadata.row_group(group).column(column)
        for group in range(metadata.num_row_groups)
        for column in range(metadata.num_columns)
    ]
    packed = sum(max(column.total_compressed_size, 0) for column in columns)
    limit = _asked() or max(AT_LEAST, RATIO * packed)
    check_unpacked(name, sum(max(column.total_uncompressed_size, 0) for column in columns), limit)
    return limit


def check_unpacked(name: str, size: int, limit: int) -> None:
    """Refuse a file of which more is unpacked than the limit, in bytes.

    Raises:
        BadFile: it is more.
    """
    if size > limit:
        raise BadFile(name, "the file as a whole", _too_much(limit))


def _asked() -> int | None:
    """The limit of the environment in bytes."""
    if not (asked := os.environ.get(OPTION)):
        return None
    try:
        return int(float(asked) * (1 << 30))
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{OPTION} is {asked!r}, expected a number of GiB") from error


def _too_much(limit: int) -> str:
    return f"unpacks to more than {limit / (1 << 30):.3g} GiB; if that is meant, set {OPTION}"


class _Bounded(io.RawIOBase):
    """Counts what is read of a stream.

    Args:
        name: of the file.
        raw: what to read.
        limit: bytes.
    """

    def __init__(self, name: str, raw: Any, limit: int) -> None:
        super().__init__()
        self._name, self._raw, self._limit, self._read = name, raw, limit, 0

    def readable(self) -> bool:
        """True."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Read some bytes.

        Raises:
            BadFile: they are more than the file may unpack to.
        """
        block = self._raw.read(len(buffer))
        self._read += len(block)
        if self._read > self._limit:
            raise BadFile(self._name, "the file as a whole", _too_much(self._limit))
        buffer[: len(block)] = block
        return len(block)


def lines(name: str, text: TextIO) -> Iterator[str]:
    """Lines of a text, none of them longer than `LONGEST_ROW`.

    Raises:
        BadFile: a longer line; names it.
    """
    number = 0
    while line := text.readline(LONGEST_ROW + 1):
        number += 1
        if len(line) > LONGEST_ROW:
            raise BadFile(name, f"line {number}", f"has more than {LONGEST_ROW:,} characters")
        yield line
