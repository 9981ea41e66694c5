"""A file is there whole or as it was, whatever happens while it is written, and whoever else writes it."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lit_align.utils.disk import replacing, sync_tree, write_whole


def contents(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


def test_the_new_takes_the_place_of_the_old(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a"
    for text in ("old", "new"):
        with replacing(path) as partial:
            partial.write_text(text)
            assert partial.parent == path.parent  # a move to another file system would be a copy
        assert contents(path.parent) == {"a": text}
    write_whole(path, "newer")
    assert contents(path.parent) == {"a": "newer"}


@pytest.mark.parametrize("racing", [False, True])
@pytest.mark.parametrize("problem", [RuntimeError, KeyboardInterrupt])
def test_one_that_fails_half_way_leaves_what_was_there(tmp_path: Path, problem: Any, racing: bool) -> None:
    (tmp_path / "a").write_text("old")

    def half() -> None:
        with replacing(tmp_path / "a", racing) as partial:
            partial.write_text("ne")
            raise problem

    with pytest.raises(problem):
        half()
    assert contents(tmp_path) == {"a": "old"}


# Kills: no fsync; an fsync after the name is given.
def test_it_is_on_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[tuple[bool, dict[str, str]]] = []

    def fsync(descriptor: int) -> None:
        synced.append((stat.S_ISDIR(os.fstat(descriptor).st_mode), contents(tmp_path)))

    monkeypatch.setattr(os, "fsync", fsync)
    write_whole(tmp_path / "a", "text")
    assert synced == [(False, {".a.partial": "text"}), (True, {"a": "text"})]


def test_what_a_killed_attempt_left_is_written_over(tmp_path: Path) -> None:
    (tmp_path / ".a.partial").write_text("of an attempt that was killed")
    write_whole(tmp_path / "a", "text")
    assert contents(tmp_path) == {"a": "text"}


# Kills: one name for all who race.
def test_two_that_race_write_the_whole_of_one_or_the_other(tmp_path: Path) -> None:
    with replacing(tmp_path / "a", racing=True) as one:
        one.write_text("one, at length")
        with replacing(tmp_path / "a", racing=True) as other:
            other.write_text("other")
        assert (tmp_path / "a").read_text() == "other"
    assert contents(tmp_path) == {"a": "one, at length"}


def test_a_link(tmp_path: Path) -> None:
    (tmp_path / "one").write_text("1")
    (tmp_path / "two").write_text("2")
    for name in ("one", "two"):
        with replacing(tmp_path / "last") as partial:
            partial.symlink_to(name)
        assert os.readlink(tmp_path / "last") == name
    assert contents(tmp_path) == {"one": "1", "two": "2", "last": "2"}


@pytest.mark.parametrize("named", [False, True])
def test_a_full_disk_names_the_file_and_leaves_the_old_one(tmp_path: Path, named: bool) -> None:
    (tmp_path / "a").write_text("old")
    with pytest.raises(OSError, match=r"No space left on device: not written; the previous content is kept: .*/a'"):
        _full(tmp_path / "a", named)
    assert contents(tmp_path) == {"a": "old"}


def _full(path: Path, named: bool) -> None:
    with replacing(path) as partial:
        partial.write_text("ne")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), *([str(partial)] if named else []))


def test_another_error_is_left_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="rows"), replacing(tmp_path / "a"):
        (tmp_path / "rows").read_text()


def test_a_folder_is_on_disk_with_all_that_is_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    seen: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: seen.append(os.fstat(descriptor).st_ino))
    sync_tree(tmp_path)
    assert set(seen) == {path.stat().st_ino for path in (tmp_path, tmp_path / "deep", tmp_path / "deep" / "file")}


# Really: the system lets no file grow beyond a limit, as a full disk would not.
WRITER = """
import resource, sys
from pathlib import Path
from lit_align.utils.disk import write_whole
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
write_whole(Path(sys.argv[1]), "new" * 9999)
"""


def test_a_file_that_the_system_cuts_off(tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text("old")
    command = [sys.executable, "-c", WRITER, str(tmp_path / "report.html")]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60)
    last = ran.stderr.strip().splitlines()[-1]
    assert last.startswith("OSError: [Errno 27] File too large: not written; the previous content is kept: ")
    assert last.endswith("report.html'")
    assert contents(tmp_path) == {"report.html": "old"}
