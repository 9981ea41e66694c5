import json
import multiprocessing
import os
import stat
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from data.chats import chatml, plain, scratch
from datasets import Dataset

from lit_align.data import store
from lit_align.data.rows import BadField, BadRow, Row, Rows, Tally
from lit_align.data.source import Source
from lit_align.data.store import Item, Store, build, tokenizer_key
from lit_align.types import Example, Segment

RAW = [{"prompt": f"p{i}", "reference": "é" * i, "n": i} for i in range(5)]


def item(row: Row) -> Item:
    n = row["n"]
    trunk = Segment([n, n + 1], [False, False])
    branches = [Segment([7] * k, [True] * k) for k in range(1, n + 1)]
    return Item(
        Example(trunk, branches), [float(k) for k in range(n)], [0.5] * n, row["prompt"], row, [0.25] * n, [7.0] * n
    )


class Encode:
    """Counts how often it is asked."""

    def __init__(self) -> None:
        self.rows = 0

    def __call__(self, row: Row, tally: Tally) -> list[Item]:
        self.rows += 1
        if row["n"] == "bad":
            raise BadField("n", "is bad")
        tally["odd"] += row["n"] % 2
        return [item(row)]


@pytest.fixture
def source(write) -> Source:
    return Source(path=write("x.jsonl", RAW))


def kept(stored: Store) -> list[Item]:
    return [stored[i] for i in range(len(stored))]


def expected() -> list[Item]:
    return [item(row) for row in RAW]


def test_items_come_back_as_they_were(source: Source, tmp_path: Path) -> None:
    for cache in (None, tmp_path / "cache"):
        stored = build(source, Encode(), "", "error", cache)
        assert len(stored) == 5
        for found, meant in zip(kept(stored), expected(), strict=True):
            assert found == meant
            assert isinstance(found.example, Example)
            assert isinstance(found.example.trunk, Segment)
        assert stored.groups() == [f"p{i}" for i in range(5)]
        assert stored.tally == {"rows": 5, "odd": 2, "examples": 5}


def test_lengths_are_those_of_the_examples(source: Source, tmp_path: Path) -> None:
    stored = build(source, Encode(), "", "error", tmp_path / "cache")
    assert stored.lengths().tolist() == [item.example.num_tokens for item in expected()] == [2, 3, 5, 8, 12]
    assert stored.lengths(share_prefix=False).tolist() == [2, 3, 2 * 2 + 3, 3 * 2 + 6, 4 * 2 + 10]


def test_lengths_of_a_file_in_many_pieces(write, tmp_path: Path) -> None:
    """A chunk's offsets begin where the one before ended, or at 0: both must be read right, and an empty one too."""
    rows = [{**RAW[i % 5], "prompt": f"p{i}"} for i in range(2_346)]  # written a thousand at a time
    stored = build(Source(path=write("many.jsonl", rows)), Encode(), "", "error", tmp_path / "cache")
    meant = [item(row).example.num_tokens for row in rows]
    assert len(stored.data.data.column("branches").chunks) == 3
    assert stored.lengths().tolist() == meant
    sliced = Store(Dataset(stored.data.data.slice(500, 1_200)), stored.tally, "")
    assert sliced.lengths().tolist() == meant[500:1_700]
    empty = Store(Dataset(stored.data.data.slice(0, 0)), stored.tally, "")
    assert empty.lengths().tolist() == []


def test_a_row_of_python_objects_is_kept_as_json(write, tmp_path: Path) -> None:
    raw = [{**RAW[1], "when": None, "deep": {"a": [1, {"b": True}]}, "path": "\\n"}]
    assert kept(build(Source(path=write("y.jsonl", raw)), Encode(), "", "error", None))[0].row == raw[0]


def test_the_second_time_nothing_is_encoded(source: Source, tmp_path: Path) -> None:
    first, second = Encode(), Encode()
    one = build(source, first, "o", "error", tmp_path / "cache")
    two = build(source, second, "o", "error", tmp_path / "cache")
    assert (first.rows, second.rows) == (5, 0)
    assert kept(one) == kept(two)
    assert (one.tally, one.fingerprint) == (two.tally, two.fingerprint)
    assert sorted(path.suffix for path in (tmp_path / "cache").iterdir()) == [".arrow", ".json"]


def test_whatever_changes_the_items_changes_the_key(source: Source, write, tmp_path: Path, monkeypatch) -> None:
    cache = tmp_path / "cache"
    keys = [
        build(source, Encode(), "o", "error", cache).fingerprint,
        build(source, Encode(), "another option", "error", cache).fingerprint,
        build(source, Encode(), "o", "skip", cache).fingerprint,
        build(Source(path=source.path, limit=3), Encode(), "o", "error", cache).fingerprint,
    ]
    write("x.jsonl", RAW[:4])
    keys.append(build(source, Encode(), "o", "error", cache).fingerprint)
    monkeypatch.setattr(store, "VERSION", store.VERSION + 1)
    keys.append(build(source, Encode(), "o", "error", cache).fingerprint)
    assert len(set(keys)) == len(keys)


def test_tokenizer_key() -> None:
    def key(**changes: Any) -> str:
        tokenizer = scratch()
        for name, value in changes.items():
            setattr(tokenizer, name, value)
        return tokenizer_key(tokenizer)

    assert key() == key()
    keys = {key(), key(chat_template="{{ messages }}"), key(eos_token="<pad>"), tokenizer_key(chatml())}
    assert len(keys | {tokenizer_key(plain())}) == 5


def test_bad_rows_are_named_or_counted(write, tmp_path: Path) -> None:
    raw = [*RAW[:2], {"prompt": "x", "n": "bad"}, {"n": 1}, RAW[3]]
    source = Source(path=write("y.jsonl", raw), format="prompts")
    with pytest.raises(BadRow, match=r"y\.jsonl, row 3: field 'n' is bad \(mend the row, or set on_bad_row: skip"):
        build(source, Encode(), "", "error", tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == [], "a failed build leaves nothing behind"
    for _ in range(2):  # the second time out of the cache
        stored = build(source, Encode(), "", "skip", tmp_path / "cache")
        assert stored.tally == {"rows": 5, "skipped": 2, "odd": 2, "examples": 3}
        assert "y.jsonl, row 3: field 'n' is bad" in str(stored.tally)


class Numbers(Rows):
    def __init__(self, count: int, fingerprint: str | None = None) -> None:
        self.count = count
        self.fingerprint = fingerprint

    def __iter__(self) -> Iterator[Row]:
        yield from ({"prompt": str(i), "n": i} for i in range(self.count))


def test_rows_without_a_fingerprint_are_not_cached(tmp_path: Path) -> None:
    encode = Encode()
    stored = [build(Source(rows=Numbers(n)), encode, "", "error", tmp_path / "cache") for n in (2, 2, 3)]
    assert encode.rows == 7
    assert not (tmp_path / "cache").exists()
    # For the run's manifest they are known by what came out.
    assert stored[0].fingerprint == stored[1].fingerprint != stored[2].fingerprint
    build(Source(rows=Numbers(2, "two")), encode, "", "error", tmp_path / "cache")
    build(Source(rows=Numbers(2, "two")), encode, "", "error", tmp_path / "cache")
    assert encode.rows == 9


def test_folder_that_cannot_be_written(source: Source, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.warns(UserWarning, match="cannot write to the cache .*file.*: data is tokenised anew in every run"):
        stored = build(source, Encode(), "", "error", tmp_path / "file" / "cache")
    assert kept(stored) == expected()


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_folder_that_may_not_be_written(source: Source, tmp_path: Path) -> None:
    tmp_path.chmod(stat.S_IREAD | stat.S_IEXEC)
    with pytest.warns(UserWarning, match="cannot write to the cache"):
        assert kept(build(source, Encode(), "", "error", tmp_path / "cache")) == expected()


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def overwritten(path: Path) -> None:
    path.write_bytes(b"\x07" * path.stat().st_size)


def removed(path: Path) -> None:
    path.unlink()


def of_another_kind(path: Path) -> None:
    path.write_text("[1, 2]" if path.suffix == ".json" else "text")


@pytest.mark.parametrize("damage", [truncated, emptied, overwritten, removed, of_another_kind])
@pytest.mark.parametrize("which", [".arrow", ".json"])
def test_what_is_not_whole_is_made_anew(source: Source, tmp_path: Path, which: str, damage) -> None:
    cache = tmp_path / "cache"
    build(source, Encode(), "", "error", cache)
    (path,) = cache.glob(f"*{which}")
    damage(path)
    encode = Encode()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stored = build(source, encode, "", "error", cache)
    assert encode.rows == 5
    assert kept(stored) == expected()
    assert stored.tally == {"rows": 5, "odd": 2, "examples": 5}
    again = Encode()
    build(source, again, "", "error", cache)
    assert again.rows == 0


def test_an_arrow_file_of_fewer_items_is_made_anew(source: Source, tmp_path: Path) -> None:
    """A stream cut between two batches of records reads without an error."""
    cache = tmp_path / "cache"
    build(source, Encode(), "", "error", cache)
    (whole,) = cache.glob("*.arrow")
    build(Source(path=source.path, limit=3), Encode(), "", "error", cache)
    (part,) = set(cache.glob("*.arrow")) - {whole}
    whole.write_bytes(part.read_bytes())
    told = json.loads(whole.with_suffix(".json").read_text())
    whole.with_suffix(".json").write_text(json.dumps({**told, "bytes": whole.stat().st_size}))
    assert kept(build(source, Encode(), "", "error", cache)) == expected()


def test_a_crash_between_the_two_files(source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache"
    replace = Path.replace

    def crash(self: Path, target: Path) -> Path:
        if target.suffix == ".arrow":
            raise KeyboardInterrupt
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        build(source, Encode(), "", "error", cache)
    monkeypatch.undo()
    assert [path.suffix for path in cache.iterdir()] == [".json"]
    (cache / "x.123.partial").write_bytes(b"torn")  # of a process that was killed
    assert kept(build(source, Encode(), "", "error", cache)) == expected()


def _build_at_once(path: str, cache: str, barrier: Any, results: Any) -> None:
    source = Source(path=path)
    barrier.wait()
    stored = build(source, Encode(), "", "error", Path(cache))
    results.put((len(stored), dict(stored.tally), [found.group for found in kept(stored)]))


def test_processes_that_build_at_once_all_succeed(source: Source, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(3), context.Queue()
    arguments = (source.path, str(tmp_path / "cache"), barrier, results)
    processes = [context.Process(target=_build_at_once, args=arguments) for _ in range(3)]
    for process in processes:
        process.start()
    found = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert found == [(5, {"rows": 5, "odd": 2, "examples": 5}, [f"p{i}" for i in range(5)])] * 3
    assert sorted(path.suffix for path in (tmp_path / "cache").iterdir()) == [".arrow", ".json"]


def test_a_source_of_which_nothing_is_left(tmp_path: Path, write) -> None:
    source = Source(path=write("y.jsonl", [{"prompt": "x", "n": "bad"}]))
    for _ in range(2):
        stored = build(source, Encode(), "", "skip", tmp_path / "cache")
        assert (len(stored), stored.groups(), stored.tally["skipped"]) == (0, [], 1)


# Kills: a length for a checksum; the file of counts left out.
@pytest.mark.parametrize("which", [".arrow", ".json"])
@pytest.mark.parametrize("where", [0.3, 0.6, 0.9])
def test_a_flipped_bit_is_found_and_the_rows_are_made_anew(
    source: Source, tmp_path: Path, which: str, where: float, caplog: pytest.LogCaptureFixture
) -> None:
    cache = tmp_path / "cache"
    build(source, Encode(), "", "error", cache)
    (path,) = cache.glob(f"*{which}")
    content = bytearray(path.read_bytes())
    content[int(len(content) * where)] ^= 0x01
    path.write_bytes(bytes(content))
    encode = Encode()
    with caplog.at_level("INFO"):
        stored = build(source, encode, "", "error", cache)
    assert encode.rows == 5
    assert kept(stored) == expected()
    if which == ".arrow":
        assert f"the cached rows {path} have changed on disk since they were written: they are made anew" in caplog.text
