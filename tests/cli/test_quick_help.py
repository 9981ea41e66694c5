"""What runs nothing answers at once: help, the version, a misspelt command, a file that does not exist."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lit_align.cli.entry import main

QUICK = [
    *([], ["--help"], ["--version"], ["fti"], ["fit", "-c", "no.yaml"], ["doctor", "no.yaml"], ["sweep"]),
    *(
        [command, "--help"]
        for command in ("demo", "pipeline", "sweep", "chat", "report", "evaluate", "annotate", "agreement")
    ),
]


@pytest.mark.parametrize("args", QUICK, ids=" ".join)
def test_what_runs_nothing_answers_without_torch(args: list[str]) -> None:
    code = (
        "import sys\n"
        "from lit_align.__main__ import entry\n"
        "try:\n"
        "    entry()\n"
        "except SystemExit:\n"
        "    pass\n"
        "slow = {'torch', 'lightning', 'transformers', 'datasets', 'matplotlib', 'jsonargparse'} & set(sys.modules)\n"
        "assert not slow, slow\n"
    )
    package = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([package, os.environ.get("PYTHONPATH", "")])}
    ended = subprocess.run(
        [sys.executable, "-c", code, *args], env=environment, capture_output=True, text=True, timeout=100
    )
    assert ended.returncode == 0, ended.stderr
    assert (ended.stdout + ended.stderr).strip()


@pytest.mark.parametrize(("word", "near"), [("fti", "fit"), ("pipelines", "pipeline"), ("doctr", "doctor")])
def test_a_misspelt_command_is_told_the_nearest(word: str, near: str) -> None:
    with pytest.raises(ValueError, match=f"unknown command '{word}', did you mean '{near}'"):
        main([word])


def test_a_missing_configuration_file_is_named_before_anything_loads(tmp_path: Path) -> None:
    for args in (["fit", "-c", str(tmp_path / "no.yaml")], ["doctor", str(tmp_path / "no.yaml")]):
        with pytest.raises(ValueError, match=r"config: File does not exist: .*no\.yaml"):
            main(args)
    with pytest.raises(ValueError, match="got a folder"):
        main(["fit", f"--config={tmp_path}"])
