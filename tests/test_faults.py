"""The fault table in small: `experiments/faults/run.py` with a few kills, and the other faults."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "experiments" / "faults" / "results"


def test_the_committed_table_has_nothing_that_is_not_as_expected() -> None:
    told = json.loads((RESULTS / "faults.json").read_text())
    assert len(told["faults"]) == 12
    assert [fault["fault"] for fault in told["faults"] if fault["wrong"] or not fault["as_expected"]] == []
    assert all(not count["differ"] and not count["lost_or_torn"] for count in told["modules"].values())
    table = (RESULTS / "faults.md").read_text()
    for fault in told["faults"]:
        assert f"| {fault['fault']} | {fault['told']} | yes |" in table.splitlines()
    assert f"{told['kills']} kills in all." in table
    assert "**no**" not in table


@pytest.mark.slow
def test_what_is_broken_off_goes_on_as_if_nothing_had_happened(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "experiments" / "faults" / "run.py"), "--kills=12", f"--out={tmp_path}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800)
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-2000:]
    told = json.loads((tmp_path / "faults.json").read_text())
    assert told["kills"] >= 12
    assert all(not count["differ"] and not count["lost_or_torn"] for count in told["modules"].values())
    assert [fault["fault"] for fault in told["faults"] if not fault["as_expected"]] == []
