"""completions.jsonl: all rows, in the order of the data, or no file."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lit_align.callbacks import PredictionsFile


def write(path: Path, batches: list[list[Any]], world: int = 1, rank: int = 0) -> None:
    trainer: Any = SimpleNamespace(world_size=world, is_global_zero=rank == 0)
    PredictionsFile(path).write_on_epoch_end(trainer, None, batches, [])  # type: ignore[arg-type]


def read(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rows_of_all_batches(tmp_path: Path) -> None:
    rows = [{"text": "a\u2028b\n"}, {"n": 2}, {"n": 3}]
    write(tmp_path / "deep" / "out.jsonl", [rows[:2], rows[2:]])
    assert read(tmp_path / "deep" / "out.jsonl") == rows


def test_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "out.jsonl"
    write(path, [[{"n": 1}]])
    with pytest.raises(TypeError, match="not JSON serializable"):
        write(path, [[{"n": 2}, {"n": object()}]])
    assert [file.name for file in tmp_path.iterdir()] == ["out.jsonl"]
    whole = Path.write_text

    def interrupted(self: Path, text: str, **options: str) -> None:
        whole(self, text[: len(text) // 2])
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "write_text", interrupted)
    with pytest.raises(OSError, match="no space"):
        write(path, [[{"n": 2}, {"n": 3}]])
    assert read(path) == [{"n": 1}]


@pytest.mark.parametrize("count", [6, 7, 8])
def test_rows_of_all_processes_in_the_order_of_the_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    # Rank r reads rows r, r + 3, ...
    parts = [[{"n": n} for n in range(rank, count, 3)] for rank in range(3)]

    def gather(gathered: list[Any], rows: list[Any]) -> None:
        assert rows in parts
        gathered[:] = parts

    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    for rank in (1, 2):
        write(tmp_path / "out.jsonl", [parts[rank]], world=3, rank=rank)
        assert not (tmp_path / "out.jsonl").exists()
    write(tmp_path / "out.jsonl", [parts[0][:1], parts[0][1:]], world=3)
    assert read(tmp_path / "out.jsonl") == [{"n": n} for n in range(count)]
