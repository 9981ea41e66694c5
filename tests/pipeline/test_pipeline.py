"""Stages in order: what is done is not done again, what has changed is, and what was interrupted goes on."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from support.configs import config
from support.metrics import steady
from support.runs import write_rows
from support.tiny import tiny_folder

from lit_align.cli.commands import _command, _step
from lit_align.pipeline.stages import Pipeline, last_validation

WRITE = "support.steps.Write"
ROOT = "runs/words"
Files = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Files:
    """A pipeline file in a folder of its own, beside the YAML of its stages; anything may be replaced."""

    def written(**changes: Any) -> Path:
        stages: dict[str, Any] = {
            "one": {"class_path": WRITE, "init_args": {"words": ["a"], "seed": 1}},
            "two": {"class_path": WRITE, "init_args": {"words": ["b"], "inputs": [f"{ROOT}/one/text.txt"]}},
            "three": {"class_path": WRITE, "init_args": {"words": ["c"], "common": 0.5}},
            "four": {"class_path": WRITE, "init_args": {"words": ["d"], "inputs": [f"{ROOT}/two/text.txt"]}},
        }
        folder = tmp_path / "files"
        folder.mkdir(exist_ok=True)
        for name, content in {**stages, **changes.pop("files", {})}.items():
            (folder / f"{name}.yaml").write_text(yaml.safe_dump(content))
        content = {"root": ROOT, "stages": {name: {"call": f"{name}.yaml"} for name in stages}, **changes}
        file = folder / "pipeline.yaml"
        file.write_text(
            yaml.safe_dump({key: value for key, value in content.items() if value is not None}, sort_keys=False)
        )
        return file

    return written


def run(pipeline: Pipeline) -> tuple[dict[str, float], list[str]]:
    """Summary, and what was said."""
    said: list[str] = []
    return pipeline.run(_command, _step, said.append), said


def ran(out: Path) -> dict[str, int]:
    """How often each stage that is there now ran."""
    return {path.parent.name: len(path.read_text().splitlines()) for path in out.glob("*/runs.txt")}


def keys(pipeline: Pipeline) -> list[str]:
    found: dict[str, str] = {}
    for stage in pipeline.stages:
        found[stage.name] = pipeline._key(stage, found)
    return list(found.values())


def test_stages_run_in_order_and_find_each_other(write: Files, tmp_path: Path) -> None:
    out = tmp_path / "out"
    pipeline = Pipeline(write(), out)
    assert [stage.parents for stage in pipeline.stages] == [[], ["one"], [], ["two"]]
    summary, said = run(pipeline)
    assert (out / "four" / "text.txt").read_text() == "a 1 b 0 d 0"
    assert [line.split(":")[0] for line in said[1::2]] == ["[1/4] one", "[2/4] two", "[3/4] three", "[4/4] four"]
    # Figures are named by stage, or as the step names them; and the file says what run() returned.
    assert {name: value for name, value in summary.items() if "seconds" not in name} == {
        "one/characters": 3,
        "two/characters": 7,
        "three/characters": 3,
        "all/common": 0.5,
        "four/characters": 11,
    }
    seconds = [summary[f"{name}/seconds"] for name in ("one", "two", "three", "four")]
    assert summary["seconds"] == round(sum(seconds), 1)
    assert summary["seconds_this_time"] >= 0
    assert json.loads((out / "summary.json").read_text()) == summary
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["seed"] == 0
    assert [manifest["stages"][name]["key"] for name in ("one", "two", "three", "four")] == keys(pipeline)
    assert manifest["stages"]["four"]["parents"] == ["two"]
    assert manifest["packages"]["torch"] == version("torch")


def test_what_is_done_is_not_done_again(write: Files, tmp_path: Path) -> None:
    file, out = write(), tmp_path / "out"
    first, _ = run(Pipeline(file, out))
    again, said = run(Pipeline(file, out))
    assert all("done before" in line for line in said)
    assert len(said) == 4
    assert ran(out) == dict.fromkeys(("one", "two", "three", "four"), 1)
    assert {**first, "seconds_this_time": 0} == {**again, "seconds_this_time": 0}


def test_a_changed_stage_is_set_aside_and_its_descendants_run_again(write: Files, tmp_path: Path) -> None:
    file, out = write(), tmp_path / "out"
    run(Pipeline(file, out))
    for number, words in enumerate((["x"], ["y"]), start=1):
        changed = {"class_path": WRITE, "init_args": {"words": words, "seed": 1}}
        _, said = run(Pipeline(write(files={"one": changed}), out))
        # One, its child two, and its grandchild four; not three.
        assert [line for line in said if "has changed" in line] == [
            f"[{i}/4] {name}: its configuration has changed; the earlier one is kept in "
            f"{out / 'replaced' / name}-{number}"
            for i, name in ((1, "one"), (2, "two"), (4, "four"))
        ]
        assert "[3/4] three: done before, in 0 s" in said
        assert (out / "four" / "text.txt").read_text() == f"{words[0]} 1 b 0 d 0"
    assert (out / "replaced" / "four-1" / "text.txt").read_text() == "a 1 b 0 d 0"
    assert (out / "replaced" / "four-2" / "text.txt").read_text() == "x 1 b 0 d 0"
    # A key that matters to a child alone leaves the parent as it is.
    changed = {"class_path": WRITE, "init_args": {"words": ["e"], "inputs": [f"{ROOT}/two/text.txt"]}}
    _, said = run(Pipeline(write(files={"four": changed, "one": changed_one(["y"])}), out))
    assert ["done before" in line for line in said[:3]] == [True] * 3
    assert (out / "four" / "text.txt").read_text() == "y 1 b 0 e 0"


def changed_one(words: list[str]) -> dict[str, Any]:
    return {"class_path": WRITE, "init_args": {"words": words, "seed": 1}}


def test_an_interrupted_step_runs_again_and_its_time_counts(write: Files, tmp_path: Path) -> None:
    flag, out = tmp_path / "flag", tmp_path / "out"
    two = {"class_path": WRITE, "init_args": {"words": ["b"], "breaks_at": str(flag)}}
    file = write(files={"two": two})
    with pytest.raises(RuntimeError, match="interrupted"):
        run(Pipeline(file, out))
    assert not (out / "two" / "done.json").exists()
    assert not (out / "summary.json").exists()
    begun = json.loads((out / "two" / "stage.json").read_text())
    assert begun["seconds"] > 0
    (out / "two" / "stage.json").write_text(json.dumps({**begun, "seconds": 100.0}))
    flag.touch()
    summary, said = run(Pipeline(file, out))
    assert said[0] == "[1/4] one: done before, in 0 s"
    assert ran(out) == {"one": 1, "two": 2, "three": 1, "four": 1}
    assert summary["two/seconds"] >= 100
    assert not (out / "replaced").exists()
    # Interrupted and then changed: the half of another configuration is not gone on with.
    (out / "two" / "done.json").unlink()
    two["init_args"]["words"] = ["c"]
    _, said = run(Pipeline(write(files={"two": two}), out))
    assert any("two: its configuration has changed" in line for line in said)
    assert ran(out)["two"] == 1


@pytest.mark.parametrize("out", [None, "x", "o", "runs", ".", "../elsewhere/words"])
def test_the_key_does_not_depend_on_the_folder(
    write: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str | None
) -> None:
    monkeypatch.chdir(tmp_path)
    expected = keys(Pipeline(write(), tmp_path / "far" / "away"))
    pipeline = Pipeline(write(), out)
    assert keys(pipeline) == expected
    assert keys(Pipeline(write(root=f"{ROOT}/"), out)) == expected
    assert keys(Pipeline(write(), out, seed=1)) != expected
    run(pipeline)
    # The root stands for the folder, in the configuration that each stage ran with too.
    assert (Path(out or ROOT) / "four" / "text.txt").read_text() == "a 1 b 0 d 0"
    inputs = yaml.safe_load((Path(out or ROOT) / "four" / "stage.yaml").read_text())["init_args"]["inputs"]
    assert [Path(name) for name in inputs] == [Path(out or ROOT) / "two" / "text.txt"]


def test_the_key_depends_on_the_command(write: Files) -> None:
    fit, predict = (Pipeline(write(stages={"one": {kind: "one.yaml"}})) for kind in ("fit", "predict"))
    assert fit.stages[0].config == predict.stages[0].config
    assert keys(fit) != keys(predict)


def test_a_moved_run_is_still_done(write: Files, tmp_path: Path) -> None:
    file = write()
    run(Pipeline(file, tmp_path / "old"))
    (tmp_path / "old").rename(tmp_path / "new")
    _, said = run(Pipeline(file, tmp_path / "new"))
    assert all("done before" in line for line in said)


def test_a_seed_is_added_to_every_seed(write: Files, tmp_path: Path) -> None:
    deep = {"words": ["a"], "nested": {"seed": 2, "list": [{"seed_everything": 3, "seeds": 4}]}, "seed": 1}
    fit = {"seed_everything": 5, "model": {"init_args": {"seed": 6}}}
    random = {"seed_everything": True}
    files = {"one": {"class_path": WRITE, "init_args": deep}, "fit": fit, "random": random}
    stages = {"one": {"call": "one.yaml"}, "fit": {"fit": "fit.yaml"}, "random": {"fit": "random.yaml"}}
    one, two, three = Pipeline(write(files=files, stages=stages), seed=10).stages
    assert one.config["init_args"] == {
        "words": ["a"],
        "nested": {"seed": 12, "list": [{"seed_everything": 13, "seeds": 4}]},
        "seed": 11,
    }
    assert two.config == {"seed_everything": 15, "model": {"init_args": {"seed": 16}}, "out": f"{ROOT}/fit"}
    # True asks for a random seed: no number to add to.
    assert three.config["seed_everything"] is True


def test_overrides(write: Files, tmp_path: Path) -> None:
    overrides = {
        "one.init_args.words.0": "z",
        "two.init_args.seed": 5,
        "three.init_args.inputs": [f"{ROOT}/one/text.txt"],
        "three.new.key": {"a": 1},
    }
    pipeline = Pipeline(write(quick={"one": {"init_args.words": ["q", "r"]}}), tmp_path, overrides=overrides)
    one, two, three, _ = pipeline.stages
    assert one.config["init_args"]["words"] == ["z"]
    assert two.config["init_args"]["seed"] == 5
    # What an override names becomes a parent, as in a file.
    assert three.parents == ["one"]
    assert three.config["new"] == {"key": {"a": 1}}
    # Overrides go over the quick form, which is applied only when asked for.
    quick = Pipeline(write(quick={"one": {"init_args.words": ["q", "r"]}}), tmp_path, quick=True, overrides=overrides)
    assert quick.stages[0].config["init_args"]["words"] == ["z", "r"]
    # Seeds of overrides are moved by --seed too only where they are part of a mapping; a plain value is meant.
    assert Pipeline(write(), seed=2, overrides={"two.init_args.seed": 5}).stages[1].config["init_args"]["seed"] == 5


STAGES = "stages are one, two, three, four"
WRONG = [
    ({"root": None}, "root (a folder) and stages (a mapping) are needed; a pipeline has root, stages and, if you like"),
    ({"root": 3}, "root (a folder) and stages (a mapping) are needed"),
    ({"stages": ["one"]}, "root (a folder) and stages (a mapping) are needed"),
    ({"stage": {}}, "unknown key 'stage'; a pipeline has root, stages and, if you like, quick"),
    ({"stages": {"one": "one.yaml"}}, "stage 'one' must be one of fit, predict, call with the name of a YAML file"),
    ({"stages": {"one": {"run": "one.yaml"}}}, "stage 'one' must be one of fit, predict, call with the name of a YAML"),
    ({"stages": {"one": {"call": None}}}, "stage 'one' must be one of fit, predict, call with the name of a YAML file"),
    ({"stages": {"one": {"call": "one.yaml", "fit": "one.yaml"}}}, "stage 'one' must be one of fit, predict, call"),
    ({"quick": [1]}, "quick must be a mapping of stages to dotted keys and their values"),
    ({"quick": {"one": 3}}, "quick must be a mapping of stages to dotted keys and their values"),
    ({"quick": {"five": {"init_args.words": []}}}, f"'five.init_args.words' overrides no key of a stage; {STAGES}"),
    (
        {"quick": {"one": {"init_args.words.7": "x"}}},
        "override 'one.init_args.words.7': '7' is not an index of a list of 1",
    ),
    (
        {"quick": {"one": {"init_args.words.x": "x"}}},
        "override 'one.init_args.words.x': 'x' is not an index of a list of 1",
    ),
    (
        {"quick": {"one": {"init_args.words.1.y": 3}}},
        "override 'one.init_args.words.1.y': '1' is not an index of a list",
    ),
    (
        {"quick": {"one": {"class_path.x": 3}}},
        "override 'one.class_path.x' goes through 'class_path', which is not a mapping",
    ),
    ({"files": {"one": {"init_args": {"inputs": [f"{ROOT}/two/x"]}}}}, "stage 'one' uses 'two', which comes after it"),
]


@pytest.mark.parametrize(("changes", "line"), WRONG, ids=lambda value: str(value)[:60])
def test_a_file_that_is_no_pipeline(write: Files, changes: dict, line: str) -> None:
    file = write(**changes)
    with pytest.raises(ValueError) as caught:
        Pipeline(file, quick=True)
    assert str(caught.value).startswith(f"{file}: {line}")
    assert "\n" not in str(caught.value)


def test_overrides_of_nothing(write: Files) -> None:
    for key in ("five.init_args.seed", "one", "one."):
        with pytest.raises(ValueError, match=rf"'{key}' overrides no key of a stage; {STAGES}"):
            Pipeline(write(), overrides={key: 3})


def test_files_that_cannot_be_read(write: Files, tmp_path: Path) -> None:
    file = write(stages={"one": {"call": "nothing.yaml"}})
    for text, line in (
        (None, "cannot read .*nothing.yaml: .*No such file"),
        ("- a", r".* holds list, expected a mapp"),
    ):
        if text is not None:
            (file.parent / "nothing.yaml").write_text(text)
        with pytest.raises(ValueError, match=line):
            Pipeline(file)
    (file.parent / "nothing.yaml").write_text("a: [\nb: {")
    with pytest.raises(ValueError, match=r"cannot read .*nothing\.yaml: .*line 2") as caught:
        Pipeline(file)
    assert "\n" not in str(caught.value)


# Stages that fit and predict.


@pytest.fixture
def fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """A pipeline of SFT, answers of the model it leaves, and a count of them; and where to run it."""
    monkeypatch.setenv("LIT_ALIGN_CACHE", str(tmp_path / "cache"))
    write_rows(tmp_path)
    start = tiny_folder(tmp_path / "start")
    sft = {**config("sft", start, tmp_path, Path("anywhere"), max_steps=8, val_check_interval=2), "seed_everything": 0}
    trained = "runs/fits/sft/model"
    answers = config("ppo", trained, tmp_path, Path("anywhere"))
    sampling = {"max_new_tokens": 4, "samples": 2}
    network = {"name": trained}
    answers["model"] = {"class_path": "lit_align.SFTModule", "init_args": {"network": network, "sampling": sampling}}
    count = {"class_path": WRITE, "init_args": {"words": ["."], "inputs": ["runs/fits/answers/completions.jsonl"]}}
    for name, content in {"sft": sft, "answers": answers, "count": count}.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(content))
    stages = {"sft": {"fit": "sft.yaml"}, "answers": {"predict": "answers.yaml"}, "count": {"call": "count.yaml"}}
    file = tmp_path / "pipeline.yaml"
    file.write_text(yaml.safe_dump({"root": "runs/fits", "stages": stages}, sort_keys=False))
    return file, tmp_path / "out"


def test_fit_predict_call(fits: tuple[Path, Path]) -> None:
    file, out = fits
    summary, _ = run(Pipeline(file, out))
    lines = (out / "answers" / "completions.jsonl").read_text().splitlines()
    assert len(lines) == 8
    assert all(len(json.loads(line)["completions"]) == 2 for line in lines)
    assert (out / "count" / "text.txt").read_text().startswith(lines[0])
    # The last validation of a fit is in the summary.
    with (out / "sft" / "metrics.csv").open(newline="") as metrics:
        losses = [float(row["val/loss"]) for row in csv.DictReader(metrics) if row["val/loss"]]
    assert len(losses) == 4
    assert summary["sft/loss"] == losses[-1]
    assert summary["sft/seconds"] > 0
    parents = json.loads((out / "answers" / "manifest.json").read_text())["parents"]
    assert list(parents) == [str(out / "sft" / "model")]


def test_an_interrupted_fit_goes_on_from_its_checkpoint(fits: tuple[Path, Path]) -> None:
    file, out = fits
    run(Pipeline(file, out))
    broken = out.parent / "broken"
    stop = {"sft.trainer.callbacks": [{"class_path": "support.stop.StopAt", "init_args": {"batch": 5}}]}
    with pytest.raises(RuntimeError, match="stopped"):
        run(Pipeline(file, broken, overrides=stop))
    last = torch.load(broken / "sft" / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["global_step"] == 4
    assert not (broken / "sft" / "model").exists()
    # The same configuration without what stopped it, as if the process had been killed from outside.
    begun = json.loads((broken / "sft" / "stage.json").read_text())
    key = keys(Pipeline(file, broken))[0]
    (broken / "sft" / "stage.json").write_text(json.dumps({**begun, "key": key}))
    _, said = run(Pipeline(file, broken))
    assert not any("has changed" in line for line in said)
    one, other = (load_file(folder / "sft" / "model" / "model.safetensors") for folder in (out, broken))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert steady(out / "sft" / "metrics.csv") == steady(broken / "sft" / "metrics.csv")
    name = "answers/completions.jsonl"
    assert (out / name).read_text() == (broken / name).read_text()


def test_an_attempt_without_a_checkpoint_begins_anew_in_the_same_folder(fits: tuple[Path, Path]) -> None:
    file, out = fits
    (out / "sft").mkdir(parents=True)
    key = keys(Pipeline(file, out))[0]
    (out / "sft" / "stage.json").write_text(json.dumps({"key": key, "seconds": 3.0}))
    (out / "sft" / "config.yaml").write_text("of the attempt that died")
    (out / "sft" / "metrics.csv").write_text("epoch,step,train/loss\n0,0,-77.5\n0,1,")
    summary, _ = run(Pipeline(file, out))
    assert {path.name for path in out.iterdir() if path.is_dir()} == {"sft", "answers", "count"}
    assert "-77.5" not in (out / "sft" / "metrics.csv").read_text()
    assert summary["sft/seconds"] >= 3


def test_the_last_validation_of_a_run(tmp_path: Path) -> None:
    assert last_validation(tmp_path / "metrics.csv") == {}
    text = "step,train/loss,val/a,val/b\n0,1.0,,\n0,,2.0,3.0\n1,1.0,,\n1,,4.0,\n"
    (tmp_path / "metrics.csv").write_text(text)
    # The last value of each metric, whichever row it is in.
    assert last_validation(tmp_path / "metrics.csv") == {"a": 4.0, "b": 3.0}
