"""The scripts of examples/: each runs as it stands on a tiny model, and stays short."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.documentation import place
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted((ROOT / "examples").glob("*.py"))
ROWS = {"dpo": "pairs.jsonl", "grpo": "sums.jsonl"}


def test_the_scripts_are_there() -> None:
    assert {script.stem for script in SCRIPTS} == set(ROWS)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_a_script_is_short_and_uses_no_command_line(script: Path) -> None:
    text = script.read_text()
    assert len(text.splitlines()) <= 40
    assert "lit_align.cli" not in text
    assert "subprocess" not in text


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_a_script_trains_and_saves_a_model(script: Path, tmp_path: Path) -> None:
    place(tmp_path)
    command = [sys.executable, str(script), "models/base", f"data/{ROWS[script.stem]}", "out"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    before, after = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("models/base", "out"))
    weights = after.state_dict()
    assert any(not weight.equal(weights[name]) for name, weight in before.state_dict().items())
