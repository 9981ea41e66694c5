"""Whatever a file or a configuration holds: a one-line error that says where, or a row that was counted."""

from __future__ import annotations

import functools
import json
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from data.fuzz import fuzz
from hypothesis import given, settings
from hypothesis import strategies as st
from support.malformed import Malformed, configurations, files
from support.parsers import only
from support.tiny import tiny_folder

from lit_align import InstructionDataModule, PreferenceDataModule, PromptDataModule, Source
from lit_align.cli import AlignCLI, main
from lit_align.cli.commands import experiments
from lit_align.data.rows import BadFile, BadRow
from lit_align.data.store import build
from lit_align.pipeline.stages import Pipeline
from lit_align.pipeline.sweep import Sweep

KINDS = (InstructionDataModule, PreferenceDataModule, PromptDataModule)


@functools.cache
def tokenizer() -> str:
    return tiny_folder(Path(tempfile.mkdtemp()))


@functools.cache
def modules() -> list[Any]:
    made = [kind(tokenizer(), [], cache_dir="none", max_length=256) for kind in KINDS]
    assert all(module.tokenizer for module in made)
    return made


def one_line(error: Exception, *names: str) -> None:
    text = str(error)
    assert text.strip(), error
    assert "\n" not in text, text
    assert len(text) < 2000, len(text)
    for name in names:
        assert name in text, text


def check_file(file: Malformed, kind: int, on_bad_row: str) -> None:
    name, raw = file
    module = modules()[kind]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(raw)
        try:
            store = build(Source(str(path)), module.encode, "", on_bad_row, None)  # type: ignore[arg-type]
        except BadRow as error:
            assert on_bad_row == "error"
            one_line(error, name)
            one_line(error, *re.findall(r", row \d+: ", str(error))[:1] or ["a row"])
        except (BadFile, ValueError) as error:
            one_line(error, name)
        else:
            tally = store.tally
            assert len(store) == tally["examples"]
            assert tally["skipped"] == 0 or on_bad_row == "skip"
            assert (tally.first_skipped is not None) == (tally["skipped"] > 0)
            # No row is dropped without being counted.
            accounted = {store[i].group for i in range(len(store))}
            told = sum(count for what, count in tally.items() if what not in ("rows", "examples"))
            assert accounted or told, dict(tally)
            lines = re.split(r"\r\n|\r|\n", raw.decode("utf-8-sig", "replace"))
            lines = [line for line in lines if line.strip()]
            if name == "rows.jsonl":
                assert tally["rows"] == len(lines), (tally, raw[:400])
                assert len(store) + told >= len(lines), (dict(tally), raw[:400])


FILES = given(files(), st.integers(0, 2), st.sampled_from(("error", "skip")))


@settings(fuzz, max_examples=60)
@FILES
def test_files(file: Malformed, kind: int, on_bad_row: str) -> None:
    check_file(file, kind, on_bad_row)


@pytest.mark.slow
@settings(fuzz, max_examples=1400)
@FILES
def test_many_files(file: Malformed, kind: int, on_bad_row: str) -> None:
    check_file(file, kind, on_bad_row)


def texts(pattern: str) -> list[str]:
    return [path.read_text() for path in sorted(experiments().glob(pattern))]


FITS = texts("sandbox/sft.yaml") + texts("sandbox/ppo.yaml") + texts("real/dpo.yaml") + texts("oasst/reward.yaml")
PIPELINES = texts("*/pipeline.yaml")
SWEEPS = texts("sweeps/*.yaml")


def given_file(text: str, use: Callable[[Path], object]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "bad.yaml"
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        try:
            use(path)
        except (ValueError, OSError) as error:  # what the command line shows in one line
            one_line(error)


@pytest.fixture
def parsed_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Classes are made, and nothing is run."""
    only("fit", monkeypatch)
    monkeypatch.setattr(AlignCLI, "_run_subcommand", lambda self, subcommand: None)
    monkeypatch.setenv("LIT_ALIGN_DATA", str(tmp_path))
    monkeypatch.chdir(tmp_path)


def check_fit(text: str) -> None:
    given_file(text, lambda path: main(["fit", "-c", str(path), "--out", str(path.parent / "out")]))


def check_pipeline(text: str) -> None:
    def use(path: Path) -> None:
        for stage in ("seed", "pretrain", "sft", "samples", "comparisons", "reward", "dpo", "ppo", "evaluate"):
            (path.parent / f"{stage}.yaml").write_text(json.dumps({"class_path": "x"}))
        Pipeline(path)

    given_file(text, use)


@settings(fuzz, max_examples=8)
@given(text=configurations(FITS))
def test_configurations(parsed_only: None, text: str) -> None:
    check_fit(text)


@settings(fuzz, max_examples=30)
@given(configurations(PIPELINES), configurations(SWEEPS))
def test_pipelines_and_sweeps(pipeline: str, sweep: str) -> None:
    check_pipeline(pipeline)
    given_file(sweep, Sweep)


@pytest.mark.slow
@settings(fuzz, max_examples=300)
@given(text=configurations(FITS))
def test_many_configurations(parsed_only: None, text: str) -> None:
    check_fit(text)


@pytest.mark.slow
@settings(fuzz, max_examples=200)
@given(configurations(PIPELINES), configurations(SWEEPS))
def test_many_pipelines_and_sweeps(pipeline: str, sweep: str) -> None:
    check_pipeline(pipeline)
    given_file(sweep, Sweep)
