"""How the work is cut up changes nothing: loss and gradient, in float64, to 1e-10."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
from support.runs import ESTIMATORS, METHODS, SUPERVISED, TARGETS, Result, one_step, write_rows
from support.tiny import ARCHITECTURES, tiny_folder

TOLERANCE = 1e-10

UNPACKED = {"packing": False}
UNSHARED = {"share_prefix": False}
PADDED = {"packing": False, "share_prefix": False}
WIDE = {"row_tokens": 300}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[str, Path]]:
    """A policy and another reference of each architecture, and the rows."""
    root = tmp_path_factory.mktemp("invariance")
    write_rows(root)

    def made(architecture: str) -> tuple[str, Path]:
        folder = root / architecture / "policy"
        if not folder.exists():
            tiny_folder(folder, architecture)
            tiny_folder(root / architecture / "reference", architecture, seed=1)
        return str(folder), root

    return made


def variants(method: str) -> dict[str, dict]:
    """Ways to take the same eight examples through one optimizer step; the first is the one to compare with."""
    if method.startswith("ppo"):
        ways = {"whole": {"micro_batch_size": 16}, "one by one": {"micro_batch_size": 2}}
        layouts = {"unpacked": UNPACKED, "unshared": UNSHARED, "padded": PADDED, "wide": WIDE}
        ways |= {name: {"micro_batch_size": 6, "layout": layout} for name, layout in layouts.items()}
        return {name: {"batch_size": 8, **way} for name, way in ways.items()} | {
            "by tokens": {"batch_size": 8, "micro_batch_tokens": 180},
            "other order": {"batch_size": 8, "micro_batch_size": 16, "seed": 5},
        }
    return {
        "whole": {"batch_size": 8},
        "one by one": {"batch_size": 1, "accumulate": 8},
        "two by two": {"batch_size": 2, "accumulate": 4},
        "by tokens": {"batch_size": 8, "micro_batch_tokens": 120},
        "by tokens, accumulated": {"batch_size": 4, "accumulate": 2, "micro_batch_tokens": 120},
        "by tokens, unshared": {"batch_size": 8, "micro_batch_tokens": 200, **UNSHARED},
        "unpacked": {"batch_size": 8, **UNPACKED},
        "unshared": {"batch_size": 8, **UNSHARED},
        "padded": {"batch_size": 8, **PADDED},
        "wide": {"batch_size": 8, **WIDE},
        "other order": {"batch_size": 8, "seed": 5},
    }


def assert_same(one: Result, other: Result, what: str) -> None:
    assert one[0] == pytest.approx(other[0], abs=TOLERANCE), what
    assert one[1].keys() == other[1].keys()
    for name, weight in one[1].items():
        assert (weight - other[1][name]).abs().max() < TOLERANCE, (what, name)


@pytest.mark.parametrize(
    ("method", "architecture"),
    [
        *itertools.product(METHODS, ARCHITECTURES),
        *((special, "llama") for special in (*ESTIMATORS, *TARGETS, *SUPERVISED)),
    ],
)
def test_micro_batches_packing_sharing_and_order_change_nothing(
    method: str, architecture: str, place: Callable[[str], tuple[str, Path]]
) -> None:
    folder, rows = place(architecture)
    results = {name: one_step(method, folder, rows, **way) for name, way in variants(method).items()}
    whole = results.pop("whole")
    for name, result in results.items():
        assert_same(whole, result, name)


def test_a_reference_that_is_computed_once_is_the_live_one(
    place: Callable[[str], tuple[str, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, rows = place("llama")
    live = one_step("dpo", folder, rows, batch_size=8)
    for what in ("computed", "read"):
        assert_same(live, one_step("dpo_cached", folder, rows, batch_size=8), what)
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    monkeypatch.setenv("LIT_ALIGN_CACHE", str(blocked))
    with pytest.warns(UserWarning, match="cannot write to the cache .*file.reference .*: the reference is computed in"):
        assert_same(live, one_step("dpo_cached", folder, rows, batch_size=8), "nowhere to keep it")
