"""The table of a reference's log-probabilities: found by key, written whole, damage noticed."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from torch import nn

from lit_align.models.reference_logps import ReferenceTable, fingerprint


def table() -> ReferenceTable:
    values = {5: [1.0, 2.0], -(2**62): [3.0, 4.0, 5.0], 9: [6.0]}
    return ReferenceTable.of({key: torch.tensor(logps, dtype=torch.float64) for key, logps in values.items()})


def test_lookup_follows_the_batch() -> None:
    assert table().lookup(torch.tensor([9, 5, 9])).tolist() == [6.0, 1.0, 2.0, 6.0]
    assert table().lookup(torch.tensor([-(2**62)])).tolist() == [3.0, 4.0, 5.0]


@pytest.mark.parametrize("key", [7, -5, 2**62])
def test_an_unknown_example_is_an_error(key: int) -> None:
    with pytest.raises(KeyError, match="was not asked about"):
        table().lookup(torch.tensor([5, key]))
    with pytest.raises(KeyError):
        ReferenceTable.of({}).lookup(torch.tensor([key]))


def test_kept_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "table.safetensors"
    assert ReferenceTable.load(path) is None
    table().save(path)
    kept = ReferenceTable.load(path)
    assert kept is not None
    assert kept.logps_Q.dtype == torch.float64
    assert kept.lookup(torch.tensor([5])).tolist() == [1.0, 2.0]
    assert [file.name for file in path.parent.iterdir()] == ["table.safetensors"]


@pytest.mark.parametrize("damage", ["short", "flipped", "empty", "text"])
def test_damage_is_noticed(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "table.safetensors"
    table().save(path)
    whole = path.read_bytes()
    flipped = whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:]
    path.write_bytes({"short": whole[:-5], "flipped": flipped, "empty": b"", "text": b"no table"}[damage])
    with pytest.warns(UserWarning, match="damaged: the reference is computed anew"):
        assert ReferenceTable.load(path) is None


def _save_often(path: Path) -> None:
    for _ in range(50):
        table().save(path)


def test_two_writers_race_and_neither_reads_half(tmp_path: Path) -> None:
    path = tmp_path / "table.safetensors"
    table().save(path)
    writers = [threading.Thread(target=_save_often, args=(path,)) for _ in range(2)]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        assert ReferenceTable.load(path) is not None
    assert [file.name for file in tmp_path.iterdir()] == ["table.safetensors"]


def test_a_fingerprint_sees_every_weight_and_its_name() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2)).bfloat16()
    first = fingerprint(model)
    assert fingerprint(model) == first
    with torch.no_grad():
        model[1].bias[1] += 1
    assert fingerprint(model) != first
    assert fingerprint(nn.ModuleDict({"a": nn.Linear(1, 1)})) != fingerprint(nn.ModuleDict({"b": nn.Linear(1, 1)}))
