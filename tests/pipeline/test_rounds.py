"""Loops of a pipeline: rounds are ordinary stages, each on what the one before has left, and resumed like others."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from support.configs import config
from support.runs import write_rows
from support.tiny import tiny_folder

from lit_align.cli.commands import _command, _step
from lit_align.pipeline.stages import Pipeline

WRITE = "support.steps.Write"
ROOT = "runs/loop"
Files = Callable[..., Path]


def run(pipeline: Pipeline) -> tuple[dict[str, float], list[str]]:
    """Summary, and what was said."""
    said: list[str] = []
    return pipeline.run(_command, _step, said.append), said


@pytest.fixture
def write(tmp_path: Path) -> Files:
    """A start, and a loop of two stages; what is given replaces keys of the loop or of the pipeline."""

    def written(quick: dict[str, Any] | None = None, more: dict[str, Any] | None = None, **changes: Any) -> Path:
        grow = {"words": ["g"], "inputs": [f"{ROOT}/start/text.txt"], "seed": 1}
        files = {
            "start": {"class_path": WRITE, "init_args": {"words": ["s"]}},
            "grow": {"class_path": WRITE, "init_args": grow},
            "copy": {"class_path": WRITE, "init_args": {"words": ["c"], "inputs": [f"{ROOT}/up_1_grow/text.txt"]}},
        }
        for name, content in files.items():
            (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(content))
        again = {"grow.init_args.inputs.0": ROOT + "/up_{before}_copy/text.txt", "grow.init_args.words": ["{round}th"]}
        loop = {"rounds": 3, "stages": {"grow": {"call": "grow.yaml"}, "copy": {"call": "copy.yaml"}}, "again": again}
        loop = {key: value for key, value in {**loop, **changes}.items() if value is not None}
        stages = {"start": {"call": "start.yaml"}, "up": loop, **(more or {})}
        file = tmp_path / "pipeline.yaml"
        file.write_text(yaml.safe_dump({"root": ROOT, "stages": stages, "quick": quick or {}}, sort_keys=False))
        return file

    return written


NAMES = ["start", *(f"up_{number}_{name}" for number in (1, 2, 3) for name in ("grow", "copy"))]


def test_a_loop_is_its_stages_round_after_round(write: Files, tmp_path: Path) -> None:
    pipeline = Pipeline(write(), tmp_path / "out", seed=5)
    assert [stage.name for stage in pipeline.stages] == NAMES
    assert [stage.round for stage in pipeline.stages] == [1, 1, 1, 2, 2, 3, 3]
    parents = [[], ["start"], ["up_1_grow"], ["up_1_copy"], ["up_2_grow"], ["up_2_copy"], ["up_3_grow"]]
    assert [stage.parents for stage in pipeline.stages] == parents
    assert {stage.file.name for stage in pipeline.stages[1:]} == {"grow.yaml", "copy.yaml"}
    run(pipeline)
    # What round 1 made is in what round 3 made; seeds are the pipeline's in every round.
    text = (tmp_path / "out" / "up_3_copy" / "text.txt").read_text()
    assert text == "s 0 g 6 c 0 2th 6 c 0 3th 6 c 0"


def test_overrides_of_every_round_and_of_one(write: Files) -> None:
    every = {"up.grow.init_args.words": ["x"]}
    words = [stage.config["init_args"]["words"] for stage in Pipeline(write(), overrides=every).stages[1::2]]
    assert words == [["x"]] * 3
    # The one round wins, whichever was said first.
    both = {"up_2_grow.init_args.words": ["y"], **every}
    words = [stage.config["init_args"]["words"] for stage in Pipeline(write(), overrides=both).stages[1::2]]
    assert words == [["x"], ["y"], ["x"]]
    quick = Pipeline(write({"up": {"copy.init_args.words": ["q"]}}), quick=True)
    assert [stage.config["init_args"]["words"] for stage in quick.stages[2::2]] == [["q"]] * 3


def test_what_changes_in_a_round_leaves_the_rounds_before(write: Files, tmp_path: Path) -> None:
    run(Pipeline(write(), tmp_path / "out"))
    _, said = run(Pipeline(write(), tmp_path / "out", overrides={"up_2_copy.init_args.words": ["n"]}))
    assert [line.split(":")[0].split()[-1] for line in said if "done before" in line] == NAMES[:4]
    assert [line.split(":")[0].split()[-1] for line in said if "has changed" in line] == NAMES[4:]
    # A round more takes up where the last one ended.
    _, said = run(Pipeline(write(rounds=4), tmp_path / "out", overrides={"up_2_copy.init_args.words": ["n"]}))
    assert sum("done before" in line for line in said) == len(NAMES)


def test_numbers_of_rounds(write: Files) -> None:
    again = {"grow.init_args.seed": "{round}", "grow.init_args.words": ["{before}", "{before}-{round}"]}
    stages = Pipeline(write(again={**again, "copy.init_args.common": 0.5}), seed=10).stages
    # Alone a number, and one that is part of the file: a seed moves with the pipeline's.
    assert [stage.config["init_args"]["seed"] for stage in stages[1::2]] == [11, 12, 13]
    assert [stage.config["init_args"]["words"] for stage in stages[1::2]] == [["g"], [1, "1-2"], [2, "2-3"]]
    assert [stage.config["init_args"].get("common") for stage in stages[2::2]] == [None, 0.5, 0.5]


WRONG = [
    ({"rounds": 0}, "loop 'up' has 0 rounds, expected a number from 1"),
    ({"rounds": "3"}, "loop 'up' has '3' rounds, expected a number from 1"),
    ({"rounds": True}, "loop 'up' has True rounds, expected a number from 1"),
    ({"stages": {}}, "loop 'up' needs stages (a mapping)"),
    ({"stages": None}, "loop 'up' needs stages (a mapping)"),
    ({"then": {}}, "loop 'up' has an unknown key 'then'; it has rounds, stages and again"),
    ({"again": ["a"]}, "loop 'up': again must be a mapping of stage.dotted.key to values"),
    (
        {"again": {"shrink.init_args.x": 1}},
        "loop 'up': again.shrink.init_args.x is not a key of a stage; stages are grow",
    ),
    ({"again": {"grow": 1}}, "loop 'up': again.grow is not a key of a stage"),
    ({"again": {"grow.class_path.x": 1}}, "again of loop 'up', 'grow.class_path.x' goes through 'class_path', which"),
    ({"stages": {"grow": {"run": "grow.yaml"}}, "again": None}, "stage 'up_1_grow' must be one of fit, predict, call"),
    ({"more": {"up_1_grow": {"call": "grow.yaml"}}}, "two stages are called 'up_1_grow'"),
    (
        {"quick": {"up": {"shrink.x": 1}}},
        "'up.shrink.x' overrides no key of a stage; stages are start, up.grow, up.copy",
    ),
    ({"quick": {"up": {"grow": 1}}}, "'up.grow' overrides no key of a stage"),
    ({"again": {"grow.init_args.inputs": [f"{ROOT}/up_3_copy/text.txt"]}}, "stage 'up_2_grow' uses 'up_3_copy', which"),
]


@pytest.mark.parametrize(("changes", "line"), WRONG, ids=lambda value: str(value)[:60])
def test_a_mistake_in_a_loop(write: Files, changes: dict, line: str) -> None:
    file = write(**changes)
    with pytest.raises(ValueError) as caught:
        Pipeline(file, quick=True)
    assert str(caught.value).startswith(f"{file}: {line}")
    assert "\n" not in str(caught.value)


# Rejection sampling and iterative DPO, in rounds: sample, choose, train.


def loop(tmp_path: Path, method: str) -> Path:
    """Two rounds of a loop around a tiny model."""
    write_rows(tmp_path)
    start = tiny_folder(tmp_path / "start")
    # A model that has learnt nothing stops at one token in three, and not at one in 263.
    generation = json.loads((tmp_path / "start" / "generation_config.json").read_text())
    stops = {**generation, "eos_token_id": [2, *range(7, 263, 3)]}
    (tmp_path / "start" / "generation_config.json").write_text(json.dumps(stops))
    chooser, file = {"sft": ("BestOfN", "best.jsonl"), "dpo": ("BestWorstPairs", "pairs.jsonl")}[method]
    samples = config("ppo", start, tmp_path, Path("anywhere"))
    sampling = {"max_new_tokens": 6, "samples": 3}
    samples["model"] = {"class_path": "lit_align.SFTModule", "init_args": {"network": {"name": start}}}
    samples["model"]["init_args"]["sampling"] = sampling
    reward = {"class_path": "lit_align.FunctionReward", "init_args": {"function": "support.runs.echo"}}
    told = {"completions": f"{ROOT}/up_1_samples/completions.jsonl", "reward": reward, "tokenizer": start}
    train = {**config(method, start, tmp_path, Path("anywhere"), max_epochs=1), "seed_everything": 0}
    train["data"]["init_args"] |= {"train": [{"path": f"{ROOT}/up_1_choose/{file}"}], "val": None, "val_fraction": 0.3}
    if method == "dpo":
        train["model"]["init_args"]["reference"] = {"name": start}
    choose = {"class_path": f"lit_align.feedback.{chooser}", "init_args": told}
    for name, content in {"samples": samples, "choose": choose, "train": train}.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(content))
    stages = {"samples": {"predict": "samples.yaml"}, "choose": {"call": "choose.yaml"}, "train": {"fit": "train.yaml"}}
    before = ROOT + "/up_{before}_train/model"
    again = {f"{stage}.model.init_args.network.name": before for stage in ("samples", "train")}
    content = {"root": ROOT, "stages": {"up": {"rounds": 2, "stages": stages, "again": again}}}
    (tmp_path / "pipeline.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return tmp_path / "pipeline.yaml"


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_a_loop_killed_in_its_second_round_goes_on_there(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIT_ALIGN_CACHE", str(tmp_path / "cache"))
    file, out, broken = loop(tmp_path, method), tmp_path / "out", tmp_path / "broken"
    summary, _ = run(Pipeline(file, out))
    for number in (1, 2):
        counts = {name: summary[f"up_{number}_choose/{name}"] for name in ("prompts", "scored", "written")}
        assert counts["prompts"] == counts["scored"] == 8
        assert summary[f"up_{number}_choose/best_score"] > summary[f"up_{number}_choose/worst_score"]
    stop = {"up_2_train.trainer.callbacks": [{"class_path": "support.stop.StopAt", "init_args": {"batch": 2}}]}
    with pytest.raises(RuntimeError, match="stopped"):
        run(Pipeline(file, broken, overrides=stop))
    assert not (broken / "up_2_train" / "done.json").exists()
    # The same configuration without what stopped it, as if the process had been killed from outside.
    key = json.loads((out / "up_2_train" / "done.json").read_text())["key"]
    begun = json.loads((broken / "up_2_train" / "stage.json").read_text())
    (broken / "up_2_train" / "stage.json").write_text(json.dumps({**begun, "key": key}))
    _, said = run(Pipeline(file, broken))
    assert ["done before" in line for line in said[:5]] == [True] * 5
    assert not any("has changed" in line for line in said)
    one, other = (load_file(folder / "up_2_train" / "model" / "model.safetensors") for folder in (out, broken))
    first = load_file(out / "up_1_train" / "model" / "model.safetensors")
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert any(not torch.equal(one[name], first[name]) for name in one)
    # Each round sampled the model that the one before had left.
    rounds = [(out / f"up_{number}_samples" / "completions.jsonl").read_text() for number in (1, 2)]
    assert rounds[0] != rounds[1]
    if method == "dpo":
        manifest = json.loads((out / "up_2_train" / "manifest.json").read_text())
        assert {str(out / "up_1_train" / "model"), str(tmp_path / "start")} <= set(manifest["parents"])
