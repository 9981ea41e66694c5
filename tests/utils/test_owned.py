"""Nothing that this program did not write is removed or replaced: refused at the start, in one line."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning import Trainer
from support.configs import config
from support.parsers import only
from support.runs import write_rows
from support.tiny import tiny_folder

from lit_align.callbacks import HFExport
from lit_align.cli.entry import main
from lit_align.models.export import export
from lit_align.pipeline.stages import Pipeline
from lit_align.pipeline.sweep import Sweep
from lit_align.report import write_report
from lit_align.utils import claim
from lit_align.utils.owned import check_replaceable, check_report, is_ours, not_exported

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    write_rows(folder)
    tiny_folder(folder / "policy")
    return folder


def written(place: Path, tmp_path: Path, out: Path, **trainer: Any) -> str:
    trainer = {"max_steps": 1, "limit_val_batches": 0, "enable_progress_bar": False, **trainer}
    content = config("sft", str(place / "policy"), place, out, **trainer)
    content["data"]["init_args"]["cache_dir"] = "none"
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(content))
    return str(tmp_path / "run.yaml")


def contents(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in sorted(folder.rglob("*")) if path.is_file()}


# Kills: a folder of the user's replaced by the export, or written into; a check that comes after the training.
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("model/net.py", "# mine\n"),
        ("model/config.json", "{}"),  # a model of the user's own
        ("checkpoints/last.ckpt", "of another program"),
        ("metrics.csv", "my,own\n1,2\n"),
        ("manifest.json", '{"name": "a web page"}'),
        ("said.jsonl", "{}\n"),
    ],
)
def test_fit_leaves_a_project_alone(
    place: Path, tmp_path: Path, name: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    only("fit", monkeypatch)
    project = tmp_path / "project"
    (project / name).parent.mkdir(parents=True)
    (project / name).write_text(text)
    monkeypatch.chdir(project)
    with pytest.raises(FileExistsError, match=f"{name.split('/')[0]} was not written by lit-align.*another --out"):
        main(["fit", "-c", written(place, tmp_path, Path("."))])
    assert contents(project) == {name: text}


def test_fit_takes_a_folder_without_such_names_and_goes_on_in_it(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    only("fit", monkeypatch)
    project = tmp_path / "project"
    (project / "checkpoints").mkdir(parents=True)
    (project / "train.py").write_text("# mine\n")
    monkeypatch.chdir(project)
    main(["fit", "-c", written(place, tmp_path, Path("."))])
    assert not_exported(project / "model") == []
    main(["fit", "-c", written(place, tmp_path, Path("."), max_steps=2), "--ckpt_path", "last"])
    # A file of the user's in the exported folder.
    (project / "model" / "notes.txt").write_text("mine\n")
    main(["fit", "-c", written(place, tmp_path, Path("."), max_steps=3), "--ckpt_path", "last"])
    with pytest.raises(ValueError, match=r"--out \. holds another run"):
        main(["fit", "-c", written(place, tmp_path, Path("."))])
    assert (project / "train.py").read_text() == "# mine\n"
    assert not_exported(project / "model") == []
    assert (project / "model.replaced-1" / "notes.txt").read_text() == "mine\n"
    assert not list(project.glob(".lit-align*"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["project", "run.yaml"]


@pytest.mark.parametrize(("command", "name"), [("predict", "completions.jsonl"), ("validate", "metrics.csv")])
def test_predict_and_validate_too(
    place: Path, tmp_path: Path, command: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    only(command, monkeypatch)
    out = tmp_path / command
    out.mkdir()
    (out / name).write_text("mine")
    with pytest.raises(FileExistsError, match=f"{name} was not written by lit-align"):
        main([command, "-c", written(place, tmp_path, out)])
    assert contents(out) == {name: "mine"}


LIGHTNING = "lightning.pytorch"


@pytest.mark.parametrize(
    ("key", "name", "arguments", "file"),
    [
        ("logger", "loggers.CSVLogger", {"save_dir": "PARENT", "name": "mine", "version": ""}, "metrics.csv"),
        ("callbacks", "callbacks.ModelCheckpoint", {"dirpath": "FOLDER", "filename": "x"}, "x.ckpt"),
        ("callbacks", "callbacks.OnExceptionCheckpoint", {"dirpath": "FOLDER", "filename": "x"}, "x.ckpt"),
        ("callbacks", "lit_align.callbacks.PredictionsFile", {"path": "FOLDER/notes.txt"}, "notes.txt"),
        ("profiler", "profilers.SimpleProfiler", {"dirpath": "FOLDER", "filename": "p"}, "fit-p.txt"),
    ],
)
@pytest.mark.filterwarnings("ignore:Experiment logs directory")
@pytest.mark.filterwarnings("ignore:.*was called without a model")
@pytest.mark.filterwarnings("ignore:.*there is no last checkpoint")
def test_nor_does_what_the_trainer_is_given_write_over_a_file(
    place: Path, tmp_path: Path, key: str, name: str, arguments: dict, file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Callbacks, loggers and profilers have folders of their own, which may lie anywhere."""
    only("fit", monkeypatch)
    folder = tmp_path / "mine"
    folder.mkdir()
    filled = {
        option: value.replace("FOLDER", str(folder)).replace("PARENT", str(tmp_path))
        for option, value in arguments.items()
    }
    spec = {"class_path": name if name.startswith("lit_align") else f"{LIGHTNING}.{name}", "init_args": filled}
    told: dict[str, Any] = {key: [spec] if key == "callbacks" else spec}
    (folder / file).write_text("precious")
    with pytest.raises(FileExistsError, match=f"{name.rpartition('.')[2]} would write to .*mine"):
        main(["fit", "-c", written(place, tmp_path, tmp_path / "run", **told)])
    assert contents(folder) == {file: "precious"}
    (folder / file).unlink()
    main(["fit", "-c", written(place, tmp_path, tmp_path / "run", **told)])
    told["max_steps"] = 2  # a run that goes on may write where it has written
    if "OnException" not in name:
        main(["fit", "-c", written(place, tmp_path, tmp_path / "run", **told), "--ckpt_path", "last"])


@pytest.mark.parametrize("name", ["manifest.json", ".lit-align.lock", "report.html"])
@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "bytes", "deep"])
def test_files_that_no_run_wrote_are_not_read(place: Path, tmp_path: Path, name: str, kind: str) -> None:
    """Reading a pipe or /dev/zero has no end."""
    file = tmp_path / "out" / name
    file.parent.mkdir()
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "device":
        file.symlink_to("/dev/zero")
    elif kind == "folder":
        file.mkdir()
    else:
        file.write_bytes(b"\xff\x00" if kind == "bytes" else b"[" * 60_000)
    assert not is_ours(file.parent)
    with pytest.raises(FileExistsError, match="not a report") if name == "report.html" else contextlib.nullcontext():
        check_report(file.parent / "report.html")
    with pytest.raises(claim.InUseError, match=r"no run wrote|in use") if "lock" in name else contextlib.nullcontext():
        claim.take(file.parent).release()


def test_an_export_replaces_an_export_alone(place: Path, tmp_path: Path) -> None:
    from lit_align import Network
    from lit_align.models.load import load_causal_lm

    model = load_causal_lm(Network(str(place / "policy")))
    export(model, None, tmp_path / "model")
    export(model, None, tmp_path / "model")
    (tmp_path / "model" / "README.md").write_text("---\ntags:\n- lit_align\n---\n# the card, written on\n")
    check_replaceable(tmp_path / "model")
    (tmp_path / "model" / "lit_align.json").unlink()  # as exports of earlier versions are, which the card tells
    check_replaceable(tmp_path / "model")
    (tmp_path / "model" / "README.md").unlink()
    with pytest.raises(FileExistsError, match=r"model holds config.json and \d more, which lit-align did not write"):
        export(model, None, tmp_path / "model")
    (tmp_path / "link").symlink_to(tmp_path / "model")
    with pytest.raises(FileExistsError, match="link holds link"):
        export(model, None, tmp_path / "link")
    assert (tmp_path / "model" / "config.json").exists()


def test_from_python_before_training(place: Path, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "net.py").touch()
    with pytest.raises(FileExistsError, match=r"holds net\.py"):
        HFExport(tmp_path / "model").setup(Trainer(logger=False, accelerator="cpu"), None, "fit")  # type: ignore[arg-type]


def pipeline(tmp_path: Path) -> Pipeline:
    (tmp_path / "step.yaml").write_text("class_path: support.steps.Write\n")
    told = {"root": "runs/p", "stages": {"data": {"call": "step.yaml"}, "second": {"call": "step.yaml"}}}
    (tmp_path / "pipeline.yaml").write_text(yaml.safe_dump(told))
    return Pipeline(tmp_path / "pipeline.yaml", tmp_path / "out")


@pytest.mark.parametrize("name", ["data/rows.csv", "second/x", "summary.json", "manifest.json", "report.html"])
def test_a_pipeline_leaves_a_project_alone(tmp_path: Path, name: str) -> None:
    run = pipeline(tmp_path)
    (tmp_path / "out" / name).parent.mkdir(parents=True)
    (tmp_path / "out" / name).write_text("mine")
    with pytest.raises(FileExistsError, match=f"{name.split('/')[0]} (was not|is not a report)"):
        run.run(lambda *call: pytest.fail("ran"), lambda *call: pytest.fail("ran"), print)
    assert contents(tmp_path / "out") == {name: "mine"}


def test_a_pipeline_that_was_interrupted_goes_on(tmp_path: Path) -> None:
    run = pipeline(tmp_path)

    def fails(file: Path, folder: Path) -> dict[str, float]:
        (folder / "half").touch()
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        run.run(lambda *call: None, fails, print)
    assert run.run(lambda *call: None, lambda *call: {"x": 1.0}, print)["second/x"] == 1.0


def test_a_sweep_leaves_a_project_alone(tmp_path: Path) -> None:
    (tmp_path / "fit.yaml").write_text("{}")
    told = {
        "method": "grid", "metric": {"name": "val/loss"}, "parameters": {"seed_everything": {"values": [1]}},
        "command": ["lit-align", "fit", "-c", str(tmp_path / "fit.yaml"), "${args}"],
    }  # fmt: skip
    (tmp_path / "sweep.yaml").write_text(json.dumps(told))
    run = Sweep(tmp_path / "sweep.yaml", tmp_path / "out")
    for name in ("sweep.json", "report.html", f"{run.points[0].name}/config.yaml"):
        (tmp_path / "out" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / name).write_text("mine")
        with pytest.raises(FileExistsError, match=f"{name.split('/')[0]} (was not|is not a report)"):
            run.run(lambda args: pytest.fail("ran"), print)
        assert contents(tmp_path / "out") == {name: "mine"}
        (tmp_path / "out" / name).unlink()


def test_a_page_of_the_users_is_no_report(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text('{"a/b": 1.0}')
    (tmp_path / "report.html").write_text("<title>mine</title>")
    with pytest.raises(FileExistsError, match=r"report\.html is not a report of lit-align"):
        write_report(tmp_path)
    (tmp_path / "report.html").unlink()
    write_report(tmp_path)
    write_report(tmp_path)


# Two fits, two pipelines and two sweeps, begun together in processes of their own.


def begin(*arguments: str, cwd: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "lit_align", *arguments]
    return subprocess.Popen(
        command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.slow
def test_two_fits_begun_together_leave_two_runs(place: Path, tmp_path: Path) -> None:
    file = written(place, tmp_path, tmp_path / "run", max_steps=3)
    seeds = ("1", "2")
    running = [begin("fit", "-c", file, "--seed_everything", seed, cwd=tmp_path) for seed in seeds]
    for process in running:
        said = process.communicate(timeout=300)
        assert process.returncode == 0, said
    assert sorted(path.name for path in tmp_path.glob("run*/model")) == ["model"] * 2
    folders = [tmp_path / "run", tmp_path / "run-2"]
    told = [str(yaml.safe_load((folder / "config.yaml").read_text())["seed_everything"]) for folder in folders]
    assert sorted(told) == sorted(seeds)
    for folder in folders:
        lines = (folder / "metrics.csv").read_text().splitlines()
        assert len(lines) == 4  # of one run alone
        card = (folder / "model" / "README.md").read_text()
        assert f"seed_everything: {told[folders.index(folder)]}" in card


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pipeline", "sweep"])
def test_of_two_pipelines_or_sweeps_begun_together_one_runs(kind: str, place: Path, tmp_path: Path) -> None:
    fit = written(place, tmp_path, tmp_path / "root" / "a", max_steps=3)
    if kind == "pipeline":
        told: dict[str, Any] = {"root": str(tmp_path / "root"), "stages": {"a": {"fit": Path(fit).name}}}
    else:
        told = {
            "method": "grid", "metric": {"name": "train/loss"}, "parameters": {"seed_everything": {"values": [1]}},
            "command": ["lit-align", "fit", "-c", fit, "${args}"],
        }  # fmt: skip
    (tmp_path / f"{kind}.yaml").write_text(yaml.safe_dump(told))
    command = (kind, str(tmp_path / f"{kind}.yaml"), "--out", str(tmp_path / "out"))
    running = [begin(*command, cwd=tmp_path) for _ in range(2)]
    said = [process.communicate(timeout=300)[1] for process in running]
    ended = [process.returncode for process in running]
    assert sorted(ended) == [0, 1], said
    loser = said[ended.index(1)]
    assert "is in use by another run (process " in loser
    assert loser.startswith("lit-align: ")
    assert loser.count("\n") == 1
    (metrics,) = (tmp_path / "out").glob("*/metrics.csv")
    assert len(metrics.read_text().splitlines()) == 4
