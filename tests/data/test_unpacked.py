"""What a packed file may unpack to: bounded as a whole and by row, and read as a stream."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import subprocess
import sys
import zipfile
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from lit_align.data import unpacked
from lit_align.data.files import open_files, read_rows
from lit_align.data.rows import BadFile

MIB = 1 << 20


def rows(path: str | Path) -> list[dict]:
    return [row for name, handle in open_files(str(path)) for _, row in read_rows(name, handle)]  # type: ignore[misc]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unpacked, "AT_LEAST", MIB)
    monkeypatch.delenv(unpacked.OPTION, raising=False)


KINDS = {
    "rows.jsonl": b'{"text": "a"}\n' * (4 * MIB // 14),
    "rows.txt": b"a a a a a a a\n\n" * (4 * MIB // 15),
    "rows.csv": b"text\n" + b"a a a a a\n" * (4 * MIB // 10),
    "rows.json": json.dumps([{"text": "a"}] * (4 * MIB // 15)).encode(),
    "zeros.txt": bytes(4 * MIB),
}
PACKERS = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}


@pytest.mark.parametrize("packed", [*PACKERS, "zip", "zip of gz"])
@pytest.mark.parametrize("name", KINDS)
def test_a_file_unpacks_to_so_much(name: str, packed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if packed in PACKERS:
        path = str(tmp_path / f"{name}.{packed}")
        Path(path).write_bytes(PACKERS[packed](KINDS[name]))
    else:
        inner = name if packed == "zip" else f"{name}.gz"
        with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(inner, KINDS[name] if packed == "zip" else gzip.compress(KINDS[name]))
        path = f"zip://{inner}::{tmp_path / 'a.zip'}"
    with pytest.raises(BadFile, match=r"unpacks to more than .* GiB; if that is meant, set LIT_ALIGN_UNPACK_GIB"):
        rows(path)
    monkeypatch.setenv(unpacked.OPTION, "0.1")
    assert rows(path)
    monkeypatch.setenv(unpacked.OPTION, "much")
    with pytest.raises(ValueError, match="expected a number of GiB"):
        rows(path)


def test_ordinary_files_are_read(tmp_path: Path) -> None:
    """Packed to a hundredth, and not packed at all."""
    text = "".join(f'{{"text": "{n * 7919}"}}\n' for n in range(100_000))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    (tmp_path / "b.jsonl").write_text(text)
    assert len(text) > MIB
    assert rows(tmp_path / "a.jsonl.gz") == rows(tmp_path / "b.jsonl")


def test_a_row_has_a_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unpacked, "LONGEST_ROW", 1000)
    monkeypatch.setattr("lit_align.data.files.LONGEST_ROW", 1000)
    long = "a" * 2000
    for name, text in (
        ("a.jsonl", f'{{"text": "b"}}\n{{"text": "{long}"}}\n'),
        ("a.csv", f"text\nb\n{long}\n"),
        ("a.txt", f"b\n\n{long}\n"),
        ("b.txt", "b\n\n" + "a a a\n" * 500),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(BadFile, match=r"line \d+.*1,000 characters"):
            rows(tmp_path / name)


def test_a_parquet_file_says_what_it_unpacks_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.parquet"
    texts = [chr(97 + n % 26) * 4000 + str(n) for n in range(2000)]
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path, compression="zstd", use_dictionary=False)
    monkeypatch.setattr(unpacked, "RATIO", 20)
    with pytest.raises(BadFile, match="unpacks to more than"):
        rows(path)
    monkeypatch.setenv(unpacked.OPTION, "1")
    assert len(rows(path)) == 2000


@pytest.mark.parametrize("typed", [True, False], ids=["a dictionary's type", "plain text"])
def test_a_word_of_a_parquet_dictionary_counts_for_each_row(typed: bool, tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    column = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 5000), pyarrow.array(["x" * (1 << 14)]))
    table = pyarrow.table({"text": column if typed else column.dictionary_decode()})
    pyarrow.parquet.write_table(table, path, dictionary_pagesize_limit=1 << 30)
    held: list[int] = []

    def read() -> None:
        for name, handle in open_files(str(path)):
            for _ in read_rows(name, handle):
                held.append(pyarrow.total_allocated_bytes())

    del table, column
    before = pyarrow.total_allocated_bytes()
    with pytest.raises(BadFile, match="unpacks to more than"):
        read()
    assert 30 < len(held) < 500
    assert max(held) - before < 4 * MIB


def test_a_stream_stays_small(tmp_path: Path) -> None:
    """A gigabyte of one line is refused within a bounded memory."""
    path = tmp_path / "a.txt.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        for _ in range(1024):
            file.write(bytes(MIB))
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_DATA, (3 << 30, 3 << 30))\n"
        "from lit_align.data.files import open_files, read_rows\n"
        f"(name, handle), = open_files({str(path)!r})\n"
        "try:\n    list(read_rows(name, handle))\nexcept ValueError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert "characters" in done.stdout or "unpacks to more than" in done.stdout, done.stderr[-500:]
