import bz2
import csv
import gzip
import io
import json
import lzma
import zipfile
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from data.fuzz import fuzz
from hypothesis import given
from hypothesis import strategies as st

from lit_align.data.files import expand, open_files, read_bytes, read_rows
from lit_align.data.rows import BadFile, BadRow

ROWS = [
    {"prompt": "Hi", "completion": "Yo"},
    {"prompt": 'two\nlines, a comma and "quotes"', "completion": "naïve 😀"},
    {"prompt": "a line separator \u2028 and a next line \x85 are no end of a row", "completion": " x "},
]


def rows_of(path: str, header: list[str] | None = None) -> list[tuple[int, dict | str]]:
    """(number, row or message of what is wrong) of every row in every file."""
    return [
        (number, str(row) if isinstance(row, BadRow) else row)
        for name, handle in open_files(path)
        for number, row in read_rows(name, handle, header)
    ]


def encoded(kind: str) -> bytes:
    """The rows as a file."""
    if kind == "json":
        return json.dumps(ROWS, indent=1, ensure_ascii=False).encode()
    if kind == "jsonl":
        return "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS).encode()
    if kind == "csv":
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, ["prompt", "completion"])
        writer.writeheader()
        writer.writerows(ROWS)
        return text.getvalue().encode()
    data = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), data)
    return data.getvalue()


PACKED = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}


@pytest.mark.parametrize("ending", PACKED)
@pytest.mark.parametrize("kind", ["json", "jsonl", "csv", "parquet"])
def test_every_kind_compressed_or_not_gives_the_same_rows(tmp_path: Path, kind: str, ending: str) -> None:
    path = tmp_path / f"x.{kind}{ending}"
    path.write_bytes(PACKED[ending](encoded(kind)))
    first = 2 if kind == "csv" else 1
    assert rows_of(str(path)) == list(enumerate(ROWS, start=first))


@pytest.mark.parametrize("kind", ["json", "jsonl", "csv"])
def test_byte_order_mark_is_no_part_of_the_first_key(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"x.{kind}"
    path.write_bytes(b"\xef\xbb\xbf" + encoded(kind))
    assert [row for _, row in rows_of(str(path))] == ROWS


def test_json_lines_under_the_name_of_json(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(encoded("jsonl"))
    assert rows_of(str(path)) == list(enumerate(ROWS, start=1))
    path.write_bytes(encoded("jsonl").replace(b"\n", b"\n{broken\n", 1))
    numbers, rows = zip(*rows_of(str(path)), strict=True)
    assert (numbers, rows[0], rows[2]) == ((1, 2, 3, 4), ROWS[0], ROWS[1])
    assert "row 2: not valid json" in rows[1]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "not valid json: Expecting value: line 1"),
        ('[{"a": 1},\n{"a": }]', "not valid json: Expecting value: line 2 column 7"),
        ('[{"a": 1}', "not valid json"),
        ('[{"a": 1}] and more', "not valid json: Extra data"),
        ('{"data": [{"a": 1}]}', "holds dict, expected a list of rows"),
        ('"text"', "holds str, expected a list of rows"),
        ("[" * 100_000, "not valid json: maximum recursion depth"),
        ("[" + "9" * 5000 + "]", "not valid json: Exceeds the limit"),
    ],
)
def test_json_that_is_no_list_of_rows(write, content: str, says: str) -> None:
    path = write("x.json", content)
    with pytest.raises(BadFile, match=f"x.json, the file as a whole: {says}"):
        rows_of(path)


def test_json_list_with_something_else_in_it(write) -> None:
    assert rows_of(write("x.json", '[{"a": 1}, null, [2], {"a": 3}]')) == [
        (1, {"a": 1}),
        (2, f"{write('x.json', '[]')}, row 2: is NoneType, expected an object {HINT}"),
        (3, f"{write('x.json', '[]')}, row 3: is list, expected an object {HINT}"),
        (4, {"a": 3}),
    ]


HINT = "(mend the row, or set on_bad_row: skip to count and leave out)"


def test_jsonl_rows_are_numbered_by_line_and_a_bad_one_stands_alone(write) -> None:
    lines = [
        b'{"a": 1}',
        b"",  # blank lines are no rows, and yet count as lines
        b'{"a": ',
        b"7",
        b'{"a": "\x00"}',  # json forbids raw control characters
        b"\x00\x00",
        b'{"a": "\xff"}',  # not UTF-8: left to whoever reads the field
        b"[" * 100_000,
        b'{"a": ' + b"9" * 5000 + b"}",
        b'{"a": 2}\r',
    ]
    found = dict(rows_of(write("x.jsonl", b"\n".join(lines))))
    assert list(found) == [1, 3, 4, 5, 6, 7, 8, 9, 10]
    assert (found[1], found[7], found[10]) == ({"a": 1}, {"a": "\udcff"}, {"a": 2})
    for number in (3, 5, 6, 8, 9):
        assert f"x.jsonl, row {number}: not valid json" in found[number]
    assert "row 4: is int, expected an object" in found[4]


def test_empty_files(write) -> None:
    assert rows_of(write("x.jsonl", "")) == rows_of(write("x.jsonl", "\n \n")) == []
    assert rows_of(write("x.json", "[]")) == rows_of(write("x.txt", "\n\n")) == rows_of(write("x.txt", "")) == []
    assert rows_of(write("x.csv", "")) == rows_of(write("x.csv", "a,b\n")) == []


def test_csv_rows_are_numbered_as_a_spreadsheet_does(write) -> None:
    path = write("x.csv", 'a,b\n1,2\n"two\nlines\r\nor three",4\n\n5\n6,7,8\n9,10\n')
    found = dict(rows_of(path))
    assert list(found) == [2, 3, 5, 6, 7]
    assert (found[2], found[7]) == ({"a": "1", "b": "2"}, {"a": "9", "b": "10"})
    assert found[3] == {"a": "two\nlines\r\nor three", "b": "4"}
    assert "x.csv, row 5: has 1 cells for 2 columns" in found[5]
    assert "x.csv, row 6: has 3 cells for 2 columns" in found[6]


def test_csv_without_a_header_line(write) -> None:
    assert rows_of(write("x.csv", "1,2\n3,4\n"), header=["a", "b"]) == [
        (1, {"a": "1", "b": "2"}),
        (2, {"a": "3", "b": "4"}),
    ]


def test_csv_with_an_unclosed_quote_does_not_swallow_the_rest_in_silence(write) -> None:
    found = dict(rows_of(write("x.csv", 'a,b\n1,2\n"3,4\n5,6\n')))
    assert found[2] == {"a": "1", "b": "2"}
    assert "row 3: not valid csv: unexpected end of data" in found[3]
    assert len(found) == 2


def test_csv_goes_on_after_a_row_it_cannot_parse(write) -> None:
    found = dict(rows_of(write("x.csv", f'a,b\n"1"x,2\n{"y" * 200_000},4\n5,6\x00\n')))
    assert "row 2: not valid csv: ',' expected after" in found[2]
    assert "row 3: not valid csv: field larger than field limit" in found[3]
    assert found[4] == {"a": "5", "b": "6\x00"}


def test_csv_with_a_column_name_twice(write) -> None:
    with pytest.raises(BadFile, match=r"x.csv, row 1: a column name comes twice in 'a', 'b', 'a'"):
        rows_of(write("x.csv", "a,b,a\n1,2,3\n"))


def test_parquet_keeps_lists_structs_and_nulls(tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": "x"}], "n": i, "none": None} for i in range(3000)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "x.parquet", row_group_size=700)
    assert rows_of(str(tmp_path / "x.parquet")) == list(enumerate(rows, start=1))


def test_damaged_parquet(write, tmp_path: Path) -> None:
    with pytest.raises(BadFile, match=r"x.parquet, after row 0: not valid parquet"):
        rows_of(write("x.parquet", b"PAR1 is not enough"))
    data = bytearray(encoded("parquet"))
    data[8:40] = bytes(32)
    with pytest.raises(BadFile, match=r"x.parquet, (after row 0: not valid|the file cannot be read)"):
        rows_of(write("x.parquet", bytes(data)))


def test_plain_text_is_a_row_for_each_block_between_blank_lines(write) -> None:
    assert rows_of(write("x.txt", "\nFirst:\nyes.\n\n \nSecond:\r\nno.\r\n\r\nlast")) == [
        (2, {"text": "First:\nyes."}),
        (6, {"text": "Second:\r\nno."}),
        (9, {"text": "last"}),
    ]


def damaged(kind: str) -> list[bytes]:
    """A compressed file cut short; overwritten in the middle; something else altogether."""
    noise = "".join(json.dumps({"a": f"{i * i}-{i**7 % 1009}"}) + "\n" for i in range(3000)).encode()
    whole = PACKED[kind](noise)
    middle = len(whole) // 2
    return [whole[:middle], whole[:middle] + b"\xa5" * 64 + whole[middle + 64 :], b"not compressed at all" * 9]


@pytest.mark.parametrize("kind", [".gz", ".bz2", ".xz"])
@pytest.mark.parametrize("how", [0, 1, 2])
def test_damaged_archive_is_an_error_that_names_the_file(tmp_path: Path, kind: str, how: int) -> None:
    path = tmp_path / f"x.jsonl{kind}"
    path.write_bytes(damaged(kind)[how])
    with pytest.raises(BadFile, match=f"x.jsonl{kind}, the file cannot be read to its end"):
        rows_of(str(path))


def test_members_of_a_zip_are_read_where_they_lie(tmp_path: Path) -> None:
    archive = tmp_path / "x.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as zipped:
        zipped.writestr("data/b.csv", "3,4\n")
        zipped.writestr("data/a.csv", "1,2\n")
        zipped.writestr("data/notes.md", "no rows here")
    assert rows_of(f"zip://data/*.csv::{archive}", ["x", "y"]) == [(1, {"x": "1", "y": "2"}), (1, {"x": "3", "y": "4"})]
    assert [path.name for path in tmp_path.iterdir()] == ["x.zip"]
    with pytest.raises(ValueError, match=r"no file matches|cannot open"):
        open_files(f"zip://none/*.csv::{archive}")
    archive.write_bytes(archive.read_bytes()[:60])
    with pytest.raises(ValueError, match=r"cannot open .*x.zip': .*zip"):
        open_files(f"zip://data/*.csv::{archive}")


def test_files_of_a_pattern_come_in_the_order_of_their_names(write, tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", "c.csv"):
        write(name, '{"a": 1}\n')
    (tmp_path / "d.jsonl").mkdir()
    assert [Path(name).name for name, _ in open_files(f"{tmp_path}/*.jsonl")] == ["a.jsonl", "b.jsonl"]


@pytest.mark.parametrize("path", ["absent.json", "*.parquet", ".", "/absent/x.csv", "file:///absent/x.csv"])
def test_no_such_file(tmp_path: Path, path: str) -> None:
    path = path if path.startswith(("/", "file")) else str(tmp_path / path)
    with pytest.raises(ValueError, match=r"(no file matches|cannot open) '"):
        open_files(path)


def test_unknown_place_and_unknown_ending(write) -> None:
    with pytest.raises(ValueError, match=r"cannot open 'nowhere://x.json'"):
        open_files("nowhere://x.json")
    with pytest.raises(ValueError, match=r"'.*x.docx' is none of json, jsonl, csv, parquet, txt"):
        rows_of(write("x.docx", "a"))


def test_environment_variables_are_filled_in(monkeypatch: pytest.MonkeyPatch, write) -> None:
    path = write("x.jsonl", '{"a": 1}')
    monkeypatch.setenv("WHERE", str(Path(path).parent))
    assert rows_of("${WHERE}/x.jsonl") == rows_of("$WHERE/x.jsonl") == [(1, {"a": 1})]
    assert expand("~/x") == str(Path.home() / "x")
    monkeypatch.delenv("WHERE")
    with pytest.raises(
        ValueError, match=r"path '\$\{WHERE\}/x' needs the environment variable WHERE, which is not set"
    ):
        expand("${WHERE}/x")


def test_what_a_fingerprint_sees(write) -> None:
    def seen(name: str, content: bytes) -> bytes:
        return b"".join(read_bytes(write(name, content)))

    assert seen("x.csv", b"a") == seen("x.csv", b"a")
    assert len({seen("x.csv", b"a"), seen("x.csv", b"b"), seen("y.csv", b"a")}) == 3
    # A damaged archive still has a fingerprint: the error comes from reading, and names the file.
    Path(write("x.jsonl", "")).with_name("y.jsonl.gz").write_bytes(b"\x1f\x8b broken")
    assert list(read_bytes(str(Path(write("x.jsonl", "")).with_name("y.jsonl.gz"))))


LINES = b'{"a": "x", "b": [1, 2]}\n{"a": "\xc3\xa9"}\n\n{"a": "z"}\n' * 3


@fuzz
@given(
    st.sampled_from(["jsonl", "json", "csv", "txt", "jsonl.gz"]),
    st.lists(st.tuples(st.integers(0, len(LINES)), st.integers(0, 6), st.binary(max_size=6)), max_size=6),
)
def test_mangled_bytes_give_rows_or_bad_rows(tmp_path: Path, kind: str, edits: list[tuple[int, int, bytes]]) -> None:
    data = gzip.compress(LINES) if kind.endswith("gz") else LINES
    for at, cut, put in edits:
        data = data[:at] + put + data[at + cut :]
    path = tmp_path / f"x.{kind}"
    path.write_bytes(data)
    try:
        found = [row for name, handle in open_files(str(path)) for _, row in read_rows(name, handle)]
    except BadFile:
        return
    assert all(isinstance(row, dict | BadRow) for row in found)
