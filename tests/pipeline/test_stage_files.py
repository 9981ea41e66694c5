"""A pipeline and a sweep that go on look at what finished stages have read and left."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.configs import config
from support.runs import write_rows
from support.tiny import tiny_folder

from lit_align.cli.commands import _command, _step
from lit_align.cli.entry import main
from lit_align.pipeline.stage_files import altered, inputs, outputs, print_of
from lit_align.pipeline.stages import Pipeline

WRITE = "support.steps.Write"
ROOT = "runs/words"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two stages, the second of which reads a file of the first and one from outside; a third reads neither."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outside.txt").write_text("o")
    stages = {
        "one": {"words": ["a"], "inputs": ["./outside.txt"]},
        "two": {"words": ["b"], "inputs": [f"{ROOT}/one/text.txt"]},
        "three": {"words": ["c"]},
    }
    for name, arguments in stages.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({"class_path": WRITE, "init_args": arguments}))
    content = {"root": ROOT, "stages": {name: {"call": f"{name}.yaml"} for name in stages}}
    (tmp_path / "pipeline.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return tmp_path


def run(place: Path, *allow: str) -> list[str]:
    said: list[str] = []
    Pipeline(place / "pipeline.yaml", place / "out").run(_command, _step, said.append, frozenset(allow))
    return said


def flip(file: Path) -> None:
    """One bit, and no change of size or time."""
    content, times = bytearray(file.read_bytes()), (file.stat().st_atime_ns, file.stat().st_mtime_ns)
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=times)


# Kills: "done before", whatever a stage's files have become.
@pytest.mark.parametrize("how", ["gone", "changed"])
def test_a_finished_stage_whose_files_are_others(place: Path, how: str) -> None:
    run(place)
    file = place / "out" / "one" / "text.txt"
    file.unlink() if how == "gone" else file.write_text("swapped")
    says = "is gone" if how == "gone" else "has changed"
    with pytest.raises(
        ValueError, match=rf"stage 'one' is done, but .*text.txt {says} .*--resume.allow data"
    ) as caught:
        run(place)
    assert "\n" not in str(caught.value)
    said = run(place, "data")
    assert f"stage 'one': {file} {says} since it was done; continues with the change" in said[0]
    if how == "changed":  # told once
        assert all("done before" in line for line in run(place))
    # The way out that the error names.
    (place / "out" / "one" / "done.json").unlink()
    run(place)
    assert file.read_text() == "o a 0"


def test_what_a_stage_has_read(place: Path) -> None:
    run(place)
    (place / "outside.txt").write_text("p")
    with pytest.raises(ValueError, match=r"stage 'one' is done, but outside.txt has changed since then"):
        run(place)
    (place / "outside.txt").write_text("o")  # put back, at another time
    assert all("done before" in line for line in run(place))


# Kills: a flipped bit that the next stage works with.
def test_a_flipped_bit_is_found_before_the_next_stage_reads_it(place: Path) -> None:
    run(place)
    file = place / "out" / "one" / "text.txt"
    flip(file)
    assert all("done before" in line for line in run(place))  # nobody reads it
    (place / "out" / "two" / "done.json").unlink()
    with pytest.raises(ValueError, match=r"stage 'one' is done, but .*text.txt has changed"):
        run(place)


def test_a_moved_or_copied_run_is_the_same(place: Path) -> None:
    run(place)
    shutil.copytree(place / "out", place / "copy", copy_function=shutil.copyfile)
    said: list[str] = []
    Pipeline(place / "pipeline.yaml", place / "copy").run(_command, _step, said.append)
    assert all("done before" in line for line in said)


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A pipeline of SFT and DPO, run by the command line."""
    monkeypatch.setenv("LIT_ALIGN_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path)
    tiny_folder(tmp_path / "start")
    sft = config("sft", "start", tmp_path, tmp_path / "x", max_steps=2)
    dpo = config("dpo", "runs/both/sft/model", tmp_path, tmp_path / "x", max_steps=2)
    for name, content in (("sft", sft), ("dpo", dpo)):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(content))
    stages = {"sft": {"fit": "sft.yaml"}, "dpo": {"fit": "dpo.yaml"}}
    (tmp_path / "both.yaml").write_text(yaml.safe_dump({"root": "runs/both", "stages": stages}, sort_keys=False))
    return lambda *more: main(["pipeline", "both.yaml", *more])


def test_a_stages_model(models: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    models()
    model = tmp_path / "runs" / "both" / "sft" / "model"
    shutil.copy(tmp_path / "start" / "model.safetensors", model)
    with pytest.raises(ValueError, match=r"stage 'sft' is done, but .*model.safetensors has changed.*allow model"):
        models()
    shutil.rmtree(model)
    with pytest.raises(ValueError, match=r"stage 'sft' is done, but .* is gone"):
        models()
    capsys.readouterr()
    models("--resume.allow", "model")
    assert "is gone since it was done" in capsys.readouterr().out
    (tmp_path / "runs" / "both" / "sft" / "done.json").unlink()  # made again from its checkpoint
    models()
    assert (model / "model.safetensors").exists()
    # What a stage starts from counts, too.
    (tmp_path / "start" / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes())
    with pytest.raises(ValueError, match=r"stage 'sft' is done, but start/model.safetensors has changed"):
        models()


# Kills: a flipped bit of an exported model that is trained on.
def test_doctor_compares_checksums(
    models: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture
) -> None:
    content = config("sft", "start", tmp_path, tmp_path / "runs" / "sft", max_steps=1)
    (tmp_path / "sft.yaml").write_text(yaml.safe_dump(content))
    main(["fit", "-c", "sft.yaml"])
    content = config("sft", "runs/sft/model", tmp_path, tmp_path / "runs" / "next", max_steps=4)
    content["data"]["init_args"] |= {"val": None, "val_fraction": 0.3}  # the rows of training are no validation
    (tmp_path / "next.yaml").write_text(yaml.safe_dump(content))
    main(["doctor", "next.yaml"])
    assert "ok     checksum" in capsys.readouterr().out
    flip(tmp_path / "runs" / "sft" / "model" / "model.safetensors")
    with pytest.raises(ValueError, match="would spoil the run"):
        main(["doctor", "next.yaml"])
    assert "checksum     runs/sft/model/model.safetensors has changed since the export" in capsys.readouterr().out
    with caplog.at_level("INFO"):
        main(["fit", "-c", "next.yaml"])
    assert "look: runs/sft/model/model.safetensors has changed since the export" in caplog.text


def test_a_finished_point_of_a_sweep(models: Callable[..., None], tmp_path: Path) -> None:
    sweep: dict[str, Any] = {
        "method": "grid",
        "metric": {"name": "train/loss"},
        "parameters": {"data.init_args.seed": {"values": [1, 2]}},
        "command": ["lit-align", "fit", "-c", "sft.yaml", "${args}"],
    }
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    main(["sweep", "sweep.yaml", "--count=1"])
    rows = json.loads((tmp_path / "demos.json").read_text())
    (tmp_path / "demos.json").write_text(json.dumps(rows[::-1]))
    with pytest.raises(ValueError, match=r"point \w+ is done, but .*demos.json has changed.*--resume.allow data"):
        main(["sweep", "sweep.yaml"])
    main(["sweep", "sweep.yaml", "--resume.allow=data"])
    with pytest.raises(ValueError, match=r"unknown kind 'dta'"):
        main(["sweep", "sweep.yaml", "--resume.allow=dta"])


def test_prints(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text("abc")
    before = print_of(file)
    assert altered(file, before) is None
    flip(file)
    assert altered(file, before) is None
    assert altered(file, before, thorough=True) == "has changed"
    file.unlink()
    assert altered(file, before) == "is gone"


def test_what_a_configuration_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROWS", str(tmp_path))
    tiny_folder(tmp_path / "model")
    for name in ("a.jsonl", "b.jsonl", "mine.jsonl"):
        (tmp_path / name).write_text(name)
    config = {
        "out": str(tmp_path / "model"),
        "model": {"name": str(tmp_path / "model"), "prompt": "x\n" * 9000},
        "data": [{"path": "$ROWS/a.jsonl"}, {"path": str(tmp_path / "[b].jsonl")}, {"path": "nowhere.jsonl"}, 3],
        "stage": f"{tmp_path}/mine.jsonl",
    }
    names = {Path(name).name for name in inputs(config, f"{tmp_path}/mine")}
    assert names >= {"a.jsonl", "b.jsonl", "model.safetensors", "config.json", "tokenizer.json"}
    assert "mine.jsonl" not in names
    assert outputs("predict", tmp_path) == {}
