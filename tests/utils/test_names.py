"""Names that become folders and files: what leads elsewhere is refused before anything is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from support.configs import config
from support.parsers import only
from support.runs import write_rows
from support.tiny import tiny_folder

from lit_align.cli.entry import main
from lit_align.utils.names import check_folder, check_name

IN_YAML = [
    "../up", "/abs", ".", "..", "", " ", "a/b", "a\\b", "a\nb", "a\x00b", "a\x1b[31mb", "a\u202eb", ".hidden", "a ",
    "$HOME", "${HOME}", "x" * 300, "a\u200bb", "..\u2028",
]  # fmt: skip
BAD = [*IN_YAML, "\ud800"]
WRITE = {"class_path": "support.steps.Write", "init_args": {"words": ["a"]}}


def written(place: Path) -> set[str]:
    return {str(path.relative_to(place)) for path in place.rglob("*")}


@pytest.mark.parametrize("name", [*BAD, 3, None, True])
def test_a_name_is_one_plain_part_of_a_path(name: object) -> None:
    with pytest.raises(ValueError, match="the stage") as told:
        check_name(name, "the stage")
    assert "\n" not in str(told.value)
    assert "\x1b" not in str(told.value)


@pytest.mark.parametrize("name", ["sft", "sft-2", "pre training", "réponse", "答", "a.b", "x" * 200])
def test_a_plain_name_stays(name: str) -> None:
    assert check_name(name, "the stage") == name


@pytest.mark.parametrize("folder", ["", ".", "./", "/", "..", "a/../b", "../a", "a\x1bb", " ", "\\", "..\\up"])
def test_a_folder_leads_somewhere(folder: str) -> None:
    with pytest.raises(ValueError, match="root"):
        check_folder(folder, "root")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    inner = tmp_path / "here" / "inner"
    inner.mkdir(parents=True)
    (inner / "stage.yaml").write_text(yaml.safe_dump(WRITE))
    monkeypatch.chdir(inner)
    return tmp_path


@pytest.mark.parametrize("out", [[], ["--out", "out"]])
@pytest.mark.parametrize("name", [*IN_YAML, "replaced", "summary.json", 3])
def test_a_stage_stays_in_the_folder(name: Any, out: list[str], place: Path) -> None:
    stage = {"call": "stage.yaml"}
    loop = {"rounds": 2, "stages": {name: stage}}
    for stages in ({"good": stage, name: stage}, {"up": loop}, {name: {**loop, "stages": {"a": stage}}}):
        if name in ("replaced", "summary.json") and name not in stages:
            continue
        if stages.get(name) and "rounds" in stages[name] and name in ("replaced", "summary.json"):
            continue
        Path("pipeline.yaml").write_text(yaml.safe_dump({"root": "runs/pipe", "stages": stages}))
        before = written(place)
        with pytest.raises(ValueError, match="stage") as told:
            main(["pipeline", "pipeline.yaml", *out])
        assert written(place) == before
        assert "\n" not in str(told.value)


@pytest.mark.parametrize("root", ["../up", ".", "", "/", "runs/../..", "runs\x1b[31m"])
def test_a_root_is_a_folder(root: str, place: Path) -> None:
    Path("pipeline.yaml").write_text(yaml.safe_dump({"root": root, "stages": {"one": {"call": "stage.yaml"}}}))
    before = written(place)
    with pytest.raises(ValueError, match="root"):
        main(["pipeline", "pipeline.yaml"])
    assert written(place) == before


def test_what_a_stage_names_stays_under_the_root(place: Path) -> None:
    Path("stage.yaml").write_text(yaml.safe_dump({**WRITE, "init_args": {"words": ["runs/pipe/../../../up"]}}))
    Path("pipeline.yaml").write_text(yaml.safe_dump({"root": "runs/pipe", "stages": {"one": {"call": "stage.yaml"}}}))
    with pytest.raises(ValueError, match=r"leads out of a stage's folder"):
        main(["pipeline", "pipeline.yaml", "--out", "out"])


def test_an_override_does_not_move_a_stage(place: Path) -> None:
    Path("fit.yaml").write_text(yaml.safe_dump({"model": "SFTModule"}))
    content = {"root": "runs/pipe", "stages": {"one": {"fit": "fit.yaml"}}}
    Path("pipeline.yaml").write_text(yaml.safe_dump({**content, "quick": {"one": {"out": "../../up"}}}))
    for given in (["--quick"], ["--set", "one.out=/tmp/up"]):
        with pytest.raises(ValueError, match=r"one\.out.*--out"):
            main(["pipeline", "pipeline.yaml", *given])


@pytest.mark.parametrize("out", [[], ["--out", "out"]])
@pytest.mark.parametrize("name", [*IN_YAML, 3])
def test_a_sweep_stays_in_its_folder(name: Any, out: list[str], place: Path) -> None:
    content = {
        "name": name,
        "method": "grid",
        "metric": {"name": "val/loss"},
        "parameters": {"seed_everything": {"values": [1]}},
        "command": ["lit-align", "fit", "${args}"],
    }
    Path("sweep.yaml").write_text(yaml.safe_dump(content))
    before = written(place)
    with pytest.raises(ValueError, match="name"):
        main(["sweep", "sweep.yaml", *out])
    assert written(place) == before


@pytest.mark.parametrize("pattern", ["../../up", "/tmp/up", "a/../../../up-{step}"])
def test_a_checkpoint_stays_in_the_folder_of_its_run(
    pattern: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    only("fit", monkeypatch)
    write_rows(tmp_path)
    content = config("sft", tiny_folder(tmp_path / "model"), tmp_path, tmp_path / "run", max_steps=1)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({**content, "checkpoint": {"filename": pattern}}))
    before = written(tmp_path)
    with pytest.raises(ValueError, match=r"checkpoint\.filename"):
        main(["fit", "-c", str(tmp_path / "run.yaml")])
    assert written(tmp_path) == before
