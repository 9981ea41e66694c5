"""Writing to disk: files that are there whole or as they were."""

from __future__ import annotations

import contextlib
import errno
import os
import uuid
import zlib
from collections.abc import Iterator
from pathlib import Path

# The disk is full, one's share of it is used up, a file grows too large, the disk fails, it cannot be written to.
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS}


@contextlib.contextmanager
def replacing(path: Path, racing: bool = False) -> Iterator[Path]:
    """A name to write to, whose file or link takes the place of `path` at the end, or is removed if anything fails.

    Args:
        path: the folder that it lies in is made.
        racing: whether other processes may write it at the same moment. Each then writes under a name of its own, which
            stays where it is killed; otherwise the next attempt writes over what a killed one has left.

    Yields:
        A name beside it, `.NAME.partial`.

    Raises:
        OSError: the disk is full, or fails; names `path`, which is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    own = f".{uuid.uuid4().hex}" if racing else ""
    partial = path.with_name(f".{path.name}{own}.partial")
    try:
        yield partial
        sync(partial)  # a name must not outlive, in a power cut, what it names
        partial.replace(path)
        with contextlib.suppress(OSError):  # not every file system can
            sync(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        # Most such errors name no file, or the one that is gone.
        if isinstance(error, OSError) and error.errno in _DISK and error.filename in (None, str(partial)):
            reason = os.strerror(error.errno)
            raise OSError(
                error.errno, f"{reason}: not written, and what was there before is kept", str(path)
            ) from error
        raise


def sync_tree(folder: Path) -> None:
    """Have a folder with all files and folders in it on disk: before a mark that says that they are done."""
    for path in [*folder.rglob("*"), folder]:
        if not path.is_symlink() and (path.is_file() or path.is_dir()):
            with contextlib.suppress(OSError):  # of a folder, not every file system can; a file may be gone
                sync(path)


def write_whole(path: Path, text: str) -> None:
    """Write a file, whole or not at all; see `replacing`."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def sync(path: Path) -> None:
    """Have what a file holds, or the names in a folder, on disk and not in the memory of the system."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def checksum(path: Path) -> str:
    """A CRC-32 of a file's content: finds flipped bits at the speed of the disk, and is no proof against intent."""
    value = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            value = zlib.crc32(block, value)
    return f"{value:08x}"
