"""Atomic writes: a file is either complete or unchanged."""

from __future__ import annotations

import contextlib
import errno
import os
import uuid
import zlib
from collections.abc import Iterator
from pathlib import Path

# Disk full, quota exceeded, file too large, I/O error, read-only file system.
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS}


@contextlib.contextmanager
def replacing(path: Path, racing: bool = False) -> Iterator[Path]:
    """Write to a temporary name that replaces `path` at the end, or is removed if anything fails.

    Args:
        path: the file to write; its folder is created.
        racing: other processes may write the same file at the same time. Each then uses its own temporary name, which a
            killed process leaves behind. Without it, the next attempt overwrites what a killed process left.

    Yields:
        The temporary name, `.NAME.partial` in the same folder.

    Raises:
        OSError: the disk is full or fails; names `path`, which is unchanged.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    own = f".{uuid.uuid4().hex}" if racing else ""
    partial = path.with_name(f".{path.name}{own}.partial")
    try:
        yield partial
        sync(partial)  # before the rename: after a power cut, the name must not point to missing content
        partial.replace(path)
        with contextlib.suppress(OSError):  # some file systems cannot sync a folder
            sync(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        # Most of these errors name no file, or the temporary one.
        if isinstance(error, OSError) and error.errno in _DISK and error.filename in (None, str(partial)):
            reason = os.strerror(error.errno)
            raise OSError(error.errno, f"{reason}: not written; the previous content is kept", str(path)) from error
        raise


def sync_tree(folder: Path) -> None:
    """Flush a folder and everything in it to disk. Call it before writing a file that marks the folder as done."""
    for path in [*folder.rglob("*"), folder]:
        if not path.is_symlink() and (path.is_file() or path.is_dir()):
            with contextlib.suppress(OSError):  # some file systems cannot sync a folder; a file may be gone
                sync(path)


def write_whole(path: Path, text: str) -> None:
    """Write a text file atomically; see `replacing`."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def checksum(path: Path) -> str:
    """CRC-32 of a file: finds flipped bits at the speed of the disk; it does not protect against intent."""
    value = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            value = zlib.crc32(block, value)
    return f"{value:08x}"
