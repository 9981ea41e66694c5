import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from lit_align.data.rows import BadFile, BadRow, Row, Rows, Tally
from lit_align.data.source import Source

GOOD = {"instruction": "Hi", "input": "", "output": "Yo"}


class Counting(Rows):
    """A user's own source."""

    def __init__(self, rows: list[Any], fingerprint: str | None = None) -> None:
        self.rows = rows
        self.fingerprint = fingerprint

    def __iter__(self) -> Iterator[Row]:
        yield from self.rows


class Other(Counting):
    pass


def test_a_source_is_one_of_three() -> None:
    for given in ({}, {"path": "a.json", "hub": "a"}, {"hub": "a", "rows": Counting([])}):
        with pytest.raises(ValueError, match=r"exactly one of path .* hub .* and rows"):
            Source(**given)
    with pytest.raises(ValueError, match="unknown format 'alpacca': choose auto or one of alpaca, instances, sharegpt"):
        Source(path="a.json", format="alpacca")
    with pytest.raises(ValueError, match="limit must be at least 1, or null for all rows, got 0"):
        Source(path="a.json", limit=0)


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        ({**GOOD, "output": None}, "'output' is null"),
        ({**GOOD, "output": 7}, "'output' is int"),
        ({**GOOD, "output": ["Yo"]}, "'output' is list"),
        ({**GOOD, "output": ""}, "'output' is empty"),
        ({"instruction": "Hi"}, "'output' is missing"),
        ({}, "'instruction' is missing; the row has no fields"),
    ],
)
def test_bad_row_stops_or_is_counted(write, read, raw: dict, says: str) -> None:
    path = write("x.jsonl", [GOOD, raw, GOOD, {**raw, "again": 1}])
    with pytest.raises(BadRow, match=rf"x\.jsonl, row 2: field {says}.*on_bad_row: skip"):
        read(path=path)
    rows, tally = read("skip", path=path)
    assert len(rows) == 2
    assert dict(tally) == {"rows": 4, "skipped": 2}
    assert f"x.jsonl, row 2: field {says}" in tally.first_skipped


def test_line_that_is_no_row_stops_or_is_counted(write, read) -> None:
    path = write("x.jsonl", json.dumps(GOOD) + '\n{"instruction": "Hi"\n[1]\n' + json.dumps(GOOD))
    with pytest.raises(BadRow, match=r"x\.jsonl, row 2: not valid json"):
        read(path=path)
    rows, tally = read("skip", path=path)
    assert (len(rows), dict(tally)) == (2, {"rows": 4, "skipped": 2})


def test_bytes_that_are_no_utf8_spoil_one_field_of_one_row(write, read) -> None:
    latin = json.dumps({**GOOD, "output": "na?ve"}).encode().replace(b"?", b"\xef")
    path = write("x.jsonl", json.dumps(GOOD).encode() + b"\n" + latin + b"\n" + json.dumps(GOOD).encode())
    with pytest.raises(BadRow, match=r"row 2: field 'output' is not valid Unicode") as error:
        read(path=path)
    str(error.value).encode()  # the message itself can be printed
    assert dict(read("skip", path=path)[1]) == {"rows": 3, "skipped": 1}


def test_file_that_ends_too_early_is_an_error_even_where_bad_rows_are_skipped(write, read) -> None:
    whole = Path(write("x.jsonl.gz", [{**GOOD, "output": str(i**5)} for i in range(2000)]))
    whole.write_bytes(whole.read_bytes()[:-2000])
    for on_bad_row in ("error", "skip"):
        with pytest.raises(BadFile, match=r"x\.jsonl\.gz, the file cannot be read to its end: Compressed file ended"):
            read(on_bad_row, path=str(whole))


def test_file_without_rows_is_an_error(write, read) -> None:
    for path in (write("x.jsonl", ""), write("x.json", "[]"), write("x.csv", "text\n")):
        with pytest.raises(ValueError, match=r"'.*x\.(jsonl|json|csv)' holds no rows"):
            read(path=path)
    with pytest.raises(ValueError, match="'Counting' holds no rows"):
        read(rows=Counting([]))


def test_unset_variable_and_absent_file(read) -> None:
    with pytest.raises(ValueError, match="needs the environment variable NOT_SET_ANYWHERE, which is not set"):
        read(path="${NOT_SET_ANYWHERE}/x.json")
    with pytest.raises(ValueError, match=r"no file matches '/absent/x.json'"):
        read(path="/absent/x.json")


def test_row_that_fits_no_format(write, read) -> None:
    path = write("x.jsonl", [{"q": "Hi", "a": "Yo"}])
    with pytest.raises(BadRow, match=r"x\.jsonl, row 1: field 'a, q' fits no known format: set `format` to one of"):
        read(path=path)
    rows, _ = read(path=path, columns={"instruction": "q", "output": "a"})
    assert rows == [{"prompt": [{"role": "user", "content": "Hi"}], "completion": "Yo"}]


def test_format_that_does_not_fit_the_row(write, read) -> None:
    with pytest.raises(BadRow, match=r"row 1: field 'conversations' is missing; the row has 'instruction', 'input'"):
        read(path=write("x.jsonl", [GOOD]), format="sharegpt")


def test_a_first_row_that_fits_nothing_does_not_decide_for_the_others(write, read) -> None:
    rows, tally = read("skip", path=write("x.jsonl", [{"id": 1}, GOOD, GOOD]))
    assert (len(rows), tally["skipped"]) == (2, 1)


def test_columns_are_mapped(write, read) -> None:
    response = {"instruction": "Hi", "input": "x", "response": "Yo"}
    (row,), _ = read(path=write("x.jsonl", [response]), columns={"output": "response"})
    assert row["completion"] == "Yo"
    # An absent column is named as the file would have it, whatever the reader calls it.
    with pytest.raises(BadRow, match="row 1: field 'answer' is missing; the row has 'instruction'"):
        read(path=write("x.jsonl", [response]), columns={"output": "answer"})
    with pytest.raises(BadRow, match=r"row 1: field 'response' is int"):
        read(path=write("x.jsonl", [{**response, "response": 3}]), columns={"output": "response"})
    with pytest.raises(BadRow, match=r"row 1: field 'chat\[0\]\.value' is null"):
        read(path=write("x.jsonl", [{"chat": [{"from": "gpt", "value": None}]}]), columns={"conversations": "chat"})


@pytest.mark.parametrize("order", [("prompt", "question"), ("question", "prompt")])
def test_a_mapped_column_wins_over_one_that_has_the_name_already(write, read, order: tuple[str, str]) -> None:
    raw = {name: f"the {name}" for name in order}
    (row,), _ = read(path=write("x.jsonl", [{**raw, "id": 3}]), columns={"prompt": "question"})
    assert row == {"prompt": "the question", "id": 3}


def test_one_column_may_serve_two_names_and_two_may_change_places(write, read) -> None:
    path = write("x.jsonl", [{"prompt": "Hi", "a": "1", "chosen": "2", "rejected": "3"}])
    (row,), _ = read(path=path, columns={"chosen": "rejected", "rejected": "chosen"})
    assert row["completions"] == ["3", "2"]
    (row,), _ = read(path=path, columns={"chosen": "a", "rejected": "a"})
    assert row["completions"] == ["1", "1"]


def test_csv_and_parquet_and_gz_give_what_json_gives(write, read, tmp_path: Path) -> None:
    raw = [{"instruction": f"say {i}", "input": "a\nb" * (i % 2), "output": f'né {i}\n, "{i}"'} for i in range(7)]
    expected, _ = read(path=write("x.json", raw))
    with (tmp_path / "x.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, raw[0])
        writer.writeheader()
        writer.writerows(raw)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(raw), tmp_path / "x.parquet")
    for path in (write("x.jsonl.gz", raw), str(tmp_path / "x.csv"), str(tmp_path / "x.parquet")):
        assert read(path=path)[0] == expected, path
    assert read(rows=Counting(raw))[0] == expected


def test_limit_reads_the_first_rows_of_all_files(write, read, tmp_path: Path) -> None:
    write("b.jsonl", [GOOD, {"id": 1}])
    write("a.jsonl", [{**GOOD, "output": str(i)} for i in range(3)])
    rows, tally = read(path=f"{tmp_path}/*.jsonl", limit=4)
    assert [row["completion"] for row in rows] == ["0", "1", "2", "Yo"]
    assert tally["rows"] == 4
    assert read("skip", path=f"{tmp_path}/*.jsonl", limit=5)[1]["skipped"] == 1


def test_a_row_says_where_it_stands(write) -> None:
    path = write("x.jsonl", [{"instruction": "Hi", "instances": [{"output": "a"}, {"output": "b"}]}, {"text": "t"}])
    where = [where for where, _ in Source(path=path, limit=1).read("error", Tally())]
    assert where == [f"{path}, row 1"] * 2


def test_rows_of_the_user(read) -> None:
    rows, tally = read(rows=Counting([GOOD, GOOD]))
    assert (len(rows), dict(tally)) == (2, {"rows": 2})
    with pytest.raises(BadRow, match="Counting, row 2: field 'output' is null"):
        read(rows=Counting([GOOD, {**GOOD, "output": None}]))
    with pytest.raises(BadRow, match="Counting, row 2: is 'text', expected a dict"):
        read(rows=Counting([GOOD, "text"]))
    assert read("skip", rows=Counting([GOOD, None]))[1]["skipped"] == 1


def test_fingerprint_changes_with_whatever_changes_the_rows(write) -> None:
    path = write("x.jsonl", [GOOD])
    seen = [
        Source(path=path),
        Source(path=path, limit=1),
        Source(path=path, format="alpaca"),
        Source(path=path, columns={"output": "input"}),
        Source(path=path, header=["a"]),
        Source(rows=Counting([], "1")),
        Source(rows=Counting([], "2")),
        Source(rows=Other([], "1")),
    ]
    prints = [source.fingerprint() for source in seen]
    write("x.jsonl", [GOOD, GOOD])
    prints.append(seen[0].fingerprint())
    assert len(set(prints)) == len(prints)
    assert None not in prints
    # It does not change with what does not.
    assert Source(path=path, weight=2.0).fingerprint() == Source(path=path).fingerprint()
    assert Source(rows=Counting([GOOD], "1")).fingerprint() == prints[5]
    assert Source(rows=Counting([])).fingerprint() is None
    assert [source.cacheable for source in (seen[0], seen[5], Source(rows=Counting([])))] == [True, True, False]


def test_fingerprint_knows_a_file_by_its_name_and_content_not_by_its_folder(write, tmp_path: Path, monkeypatch) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        write(f"{folder}/x.jsonl", [GOOD])
    prints = set()
    for folder in ("one", "two"):
        monkeypatch.setenv("HERE", str(tmp_path / folder))
        prints.add(Source(path="${HERE}/x.jsonl").fingerprint())
    assert len(prints) == 1


@pytest.fixture
def local_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that `datasets` loads by its name, with a cache of its own."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "hub"
    folder.mkdir()
    return folder


def test_data_set_by_name(local_hub: Path, read) -> None:
    raw = [{**GOOD, "input": None}, {**GOOD, "output": "No"}]
    (local_hub / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in raw))
    (local_hub / "test.jsonl").write_text(json.dumps(GOOD))
    rows, tally = read(hub=str(local_hub))
    assert [row["completion"] for row in rows] == ["Yo", "No"]
    assert tally["rows"] == 2
    assert len(read(hub=str(local_hub), split="test")[0]) == 1
    assert [row["completion"] for row in read(hub=str(local_hub), limit=1, columns={"output": "output"})[0]] == ["Yo"]
    splits = ("train", "test", "train", "train[:1]")
    prints = {Source(hub=str(local_hub), split=split).fingerprint() for split in splits}
    assert len(prints) == 3
    with pytest.raises(BadRow, match="hub, row 1: field 'conversations' is missing"):
        read(hub=str(local_hub), format="sharegpt")
    with pytest.raises(ValueError, match=r"cannot load data set '.*hub' \(split 'dev'\) from the hub: .*dev"):
        read(hub=str(local_hub), split="dev")


def test_data_set_that_cannot_be_had(read) -> None:
    with pytest.raises(ValueError, match=r"^cannot load data set 'nobody/nothing' \(split 'train'\) from the") as error:
        read(hub="nobody/nothing")
    assert "\n" not in str(error.value)
