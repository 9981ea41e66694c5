"""The cache is where the user has it, and one that cannot be written to is a warning."""

from __future__ import annotations

from pathlib import Path

import pytest

from lit_align.utils.cache_folder import cache_folder, can_keep


def test_it_is_where_the_user_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIT_ALIGN_CACHE", str(tmp_path / "own"))
    assert cache_folder("data") == tmp_path / "own" / "data"
    monkeypatch.setenv("HOME", str(tmp_path))
    for unset in (lambda: monkeypatch.setenv("LIT_ALIGN_CACHE", ""), lambda: monkeypatch.delenv("LIT_ALIGN_CACHE")):
        unset()
        assert cache_folder("data") == tmp_path / ".cache" / "lit_align" / "data"


def test_it_is_made_and_left_empty(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "cache"
    assert can_keep(folder, "it is made anew")
    assert list(folder.iterdir()) == []


def test_one_that_cannot_be_written_to_is_a_warning_and_what_follows_from_it(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.warns(UserWarning, match="cannot write to the cache .*file.cache .*: it is made anew in every run"):
        assert not can_keep(tmp_path / "file" / "cache", "it is made anew in every run")
