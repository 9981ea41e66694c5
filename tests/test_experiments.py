"""Every YAML that ships: it is reached, it parses, and what it names can be made; nothing is downloaded or trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from jsonargparse import ArgumentParser
from lightning import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from safetensors.torch import load_file
from support.parsers import only
from support.tiny import tiny_folder
from transformers import AutoModelForSequenceClassification

from lit_align.cli import AlignCLI, main
from lit_align.cli.commands import experiments
from lit_align.config.own_modules import importable
from lit_align.modules import FSDP2Strategy, ZeROStrategy
from lit_align.pipeline.stages import Pipeline, Stage, Step
from lit_align.pipeline.sweep import Sweep

FOLDER = experiments().resolve()
YAMLS = sorted(FOLDER.rglob("*.yaml"))
PIPELINES = [file for file in YAMLS if "stages" in yaml.safe_load(file.read_text())]
SWEEPS = [file for file in YAMLS if file.parent.name == "sweeps"]
CLUSTER = [file for file in YAMLS if file.parent.name == "cluster"]


def stages(quick: bool = False) -> list[Any]:
    """Every stage of every pipeline; of the quick form, those that it changes."""
    found = []
    for file in PIPELINES:
        plain, shrunken = Pipeline(file).stages, Pipeline(file, quick=True).stages
        for stage, other in zip(plain, shrunken, strict=True):
            if not quick or stage.config != other.config:
                name = f"{file.parent.relative_to(FOLDER)}-{stage.name}{'-quick' * quick}"
                found.append(pytest.param(file, other if quick else stage, id=name))
    return found


def test_every_file_is_reached_by_a_pipeline() -> None:
    reached = {*PIPELINES, *SWEEPS, *CLUSTER}
    for file in PIPELINES:
        reached |= {stage.file.resolve() for stage in Pipeline(file).stages}
    assert {str(file.relative_to(FOLDER)) for file in set(YAMLS) - reached} == set()
    assert len(PIPELINES) >= 6


@pytest.mark.parametrize("file", YAMLS, ids=lambda file: str(file.relative_to(FOLDER)))
def test_every_file_says_what_it_is_for(file: Path) -> None:
    lines = file.read_text().splitlines()
    assert lines[0].startswith("# ")
    if file in PIPELINES:
        comment = " ".join(lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))])
        assert f"lit-align pipeline experiments/{file.relative_to(FOLDER)}" in comment


@pytest.mark.parametrize("file", PIPELINES, ids=lambda file: file.parent.name)
def test_stages_find_their_parents(file: Path) -> None:
    pipeline = Pipeline(file)
    names = [stage.name for stage in pipeline.stages]
    for number, stage in enumerate(pipeline.stages):
        assert set(stage.parents) <= set(names[:number])
        alone = yaml.safe_load(stage.file.read_text())
        # Run by hand, a stage writes where the pipeline would have it, in its first round.
        assert stage.kind == "call" or stage.round > 1 or alone["out"] == f"{pipeline.root}/{stage.name}"
        # With another --seed a fit starts from another one.
        assert stage.kind != "fit" or isinstance(alone["seed_everything"], int)


def placed(value: Any, model: str, root: str) -> Any:
    """A configuration with every model of an earlier stage replaced by a folder that is there."""
    if isinstance(value, dict):
        return {key: placed(item, model, root) for key, item in value.items()}
    if isinstance(value, list):
        return [placed(item, model, root) for item in value]
    return model if isinstance(value, str) and value.startswith(f"{root}/") and value.endswith("/model") else value


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_folder(tmp_path_factory.mktemp("model"))


def instantiated(file: Path, stage: Stage, model: str, out: Path, *more: str) -> AlignCLI:
    """Model, data and trainer of a stage, made by the command line and not run."""
    root = yaml.safe_load(file.read_text())["root"]
    config = {**placed(stage.config, model, root), "out": str(out)}
    (out.parent / "stage.yaml").write_text(yaml.safe_dump(config))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AlignCLI, "_run_subcommand", lambda *_: None)
        only(stage.kind, patch)
        # No GPU is needed to see that a configuration is one.
        return main([stage.kind, "-c", str(out.parent / "stage.yaml"), "--trainer.accelerator=cpu", *more])


@pytest.mark.parametrize(("file", "stage"), [*stages(), *stages(quick=True)])
def test_every_stage_can_be_made(
    file: Path, stage: Stage, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIT_ALIGN_DATA", str(tmp_path))
    monkeypatch.setenv("LIT_ALIGN_CACHE", str(tmp_path / "cache"))
    if stage.kind == "call":
        parser = ArgumentParser(exit_on_error=False)
        parser.add_argument("--step", type=Step)
        with importable([file, stage.file]):
            step = parser.instantiate(parser.parse_object({"step": stage.config})).step
        assert callable(step.run)
        return
    with importable([file, stage.file]):
        command = instantiated(file, stage, model, tmp_path / "out")
    assert isinstance(command.model, LightningModule)
    assert isinstance(command.datamodule, LightningDataModule)
    assert isinstance(command.trainer, Trainer)
    # A fit ends; its loss falls on some data; what is evaluated on is said.
    if stage.kind == "fit":
        assert (command.trainer.max_epochs or -1) > 0 or command.trainer.max_steps > 0
        assert command.datamodule.sources["train"]
        assert command.datamodule.sources["val"] or command.datamodule.val_fraction > 0
    # The module and its data agree on whose tokens they speak.
    assert command.datamodule.tokenizer_name == command.model.network.name


@pytest.mark.parametrize("file", CLUSTER, ids=lambda file: file.stem)
def test_a_stage_can_be_made_for_several_devices(
    file: Path, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if file.stem == "zero2":
        pytest.importorskip("deepspeed")
    monkeypatch.setenv("LIT_ALIGN_CACHE", str(tmp_path / "cache"))
    pipeline = FOLDER / "sandbox" / "pipeline.yaml"
    stage = next(stage for stage in Pipeline(pipeline).stages if stage.name == "dpo")
    command = instantiated(pipeline, stage, model, tmp_path / "out", "-c", str(file), "--trainer.devices=2")
    wanted = {"ddp": DDPStrategy, "fsdp2": FSDP2Strategy, "zero2": ZeROStrategy}[file.stem]
    assert type(command.trainer.strategy) is wanted
    assert command.trainer.world_size == 2


# Sweeps.


def values(told: dict[str, Any]) -> list[Any]:
    """The ends of what a parameter may be."""
    return told["values"] if "values" in told else [told["min"], told["max"]]


def test_there_is_a_sweep_of_every_method() -> None:
    told = {file.stem: yaml.safe_load(file.read_text()) for file in SWEEPS}
    assert set(told) == {"sft", "reward", "dpo", "ppo"}
    assert {sweep["method"] for sweep in told.values()} == {"bayes", "random", "grid"}
    assert all(sweep["command"][:3] == ["lit-align", "fit", "-c"] for sweep in told.values())
    assert sum("early_terminate" in sweep for sweep in told.values()) == 3


@pytest.mark.parametrize("file", SWEEPS, ids=lambda file: file.stem)
def test_the_points_of_a_sweep_can_be_made(
    file: Path, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = yaml.safe_load(file.read_text())
    base = FOLDER.parent / told["command"][3]
    assert base.name == file.name
    (tmp_path / "base.yaml").write_text(
        yaml.safe_dump(placed(yaml.safe_load(base.read_text()), model, "runs/sandbox"), sort_keys=False)
    )
    monkeypatch.setenv("LIT_ALIGN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("WANDB_RUN_ID", "abc")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(AlignCLI, "_run_subcommand", lambda *_: None)
    only("fit", monkeypatch)
    # As many points as the parameter with the most values has.
    for number in range(max(len(values(parameter)) for parameter in told["parameters"].values())):
        point = {
            key: values(parameter)[number % len(values(parameter))] for key, parameter in told["parameters"].items()
        }
        at = told["command"].index("${args}")
        words = [
            *told["command"][1:at],
            *(f"--{key}={value}" for key, value in point.items()),
            *told["command"][at + 1 :],
        ]
        words[2] = str(tmp_path / "base.yaml")
        command = main(words)
        for key, value in point.items():
            assert command.config.fit[key] == value
        assert command.config.fit.out == f"runs/sweeps/{told['name']}/abc"
        assert type(command.trainer.logger).__name__ == "WandbLogger"
        if file.stem == "ppo":
            assert command.trainer.max_steps % command.model.optimizer_steps_per_batch == 0


@pytest.mark.parametrize("file", SWEEPS, ids=lambda file: file.stem)
def test_a_sweep_runs_without_weights_and_biases_too(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(FOLDER.parent)
    told = yaml.safe_load(file.read_text())
    if told["method"] == "bayes":
        with pytest.raises(ValueError, match="grid and random run locally"):
            Sweep(file)
        told["method"] = "random"
    (tmp_path / file.name).write_text(yaml.safe_dump(told, sort_keys=False))
    sweep = Sweep(tmp_path / file.name)
    assert len(sweep.points) == told.get("run_cap", 12)
    assert sweep.out == Path("runs/sweeps") / told["name"]


@pytest.mark.parametrize("file", SWEEPS, ids=lambda file: file.stem)
def test_a_sweep_is_one_to_weights_and_biases(file: Path) -> None:
    """Against the schema that its server validates with: `pip install sweeps`, which this project does not need."""
    sweeps = pytest.importorskip("sweeps")
    told = yaml.safe_load(file.read_text())
    assert sweeps.schema_violations_from_proposed_config(told) == []
    assert sweeps.schema_violations_from_proposed_config({**told, "method": "gird"})


# The experiments on real models, on a model of their architecture and rows of their data's published layout.

TURNS = [{"role": "user", "content": "say a bee"}]
ROWS = {
    "tatsu-lab/alpaca": {"instruction": "say", "input": "a bee", "output": "a bee", "text": "say a bee: a bee"},
    "trl-lib/ultrafeedback_binarized": {
        "chosen": [*TURNS, {"role": "assistant", "content": "a bee"}],
        "rejected": [*TURNS, {"role": "assistant", "content": "no"}],
        "score_chosen": 8.0,
        "score_rejected": 3.0,
    },
    "trl-lib/tldr": {"prompt": "SUBREDDIT: r/bees\n\nPOST: a bee\n\nTL;DR:", "completion": " a bee."},
}
SMALL = {
    "sft": ["--trainer.accumulate_grad_batches=1", "--data.val_fraction=0.5"],
    "reward": ["--trainer.accumulate_grad_batches=1"],
    "dpo": ["--trainer.accumulate_grad_batches=1"],
    "ppo": ["--data.batch_size=2", "--model.sampling.max_new_tokens=4", "--trainer.max_steps=4"],
}


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A tiny Qwen2 with random weights, and one with a scalar head."""
    folder = tmp_path_factory.mktemp("qwen")
    name = tiny_folder(folder / "model", "qwen2", num_key_value_heads=2)
    torch.manual_seed(1)
    scorer = AutoModelForSequenceClassification.from_pretrained(name, num_labels=1)
    scorer.save_pretrained(folder / "reward")
    for file in (folder / "model").glob("*token*"):
        (folder / "reward" / file.name).write_bytes(file.read_bytes())
    return name, str(folder / "reward")


def real(value: Any, qwen: tuple[str, str], rows: Path) -> Any:
    """A configuration of experiments/real with its models and its data sets replaced."""
    if isinstance(value, dict):
        if "hub" in value:
            file = rows / f"{value['hub'].replace('/', '-')}.jsonl"
            file.write_text("".join(json.dumps(ROWS[value["hub"]]).replace("bee", f"bee {i}") + "\n" for i in range(8)))
            return {**{key: item for key, item in value.items() if key not in ("hub", "split")}, "path": str(file)}
        return {key: real(item, qwen, rows) for key, item in value.items()}
    if isinstance(value, list):
        return [real(item, qwen, rows) for item in value]
    if value == "runs/real/reward/model":
        return qwen[1]
    return qwen[0] if value in ("Qwen/Qwen2.5-0.5B", "runs/real/sft/model") else value


REAL = [stage for stage in stages() if stage.values[0].parent.name == "real"]


@pytest.mark.parametrize(("file", "stage"), REAL)
def test_the_real_experiments_load_weights_and_train(
    file: Path, stage: Stage, qwen: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIT_ALIGN_CACHE", str(tmp_path / "cache"))
    changed = Stage(stage.name, stage.kind, real(stage.config, qwen, tmp_path), [])
    assert "runs/real" not in yaml.safe_dump({**changed.config, "out": ""})
    command = instantiated(file, changed, qwen[0], tmp_path / "out")
    command.model.configure_model()
    weights = load_file(Path(qwen[0]) / "model.safetensors")
    backbone = command.model.scorer.hf if stage.name == "reward" else command.model.policy.hf
    loaded = backbone.state_dict()
    assert backbone.config.model_type == "qwen2"
    assert {weight.dtype for weight in loaded.values()} == {torch.float32}
    names = [name for name in weights if name in loaded]
    assert len(names) >= len(weights) - 1  # the language model's head, which a scorer has not
    assert all(torch.equal(loaded[name], weights[name].float()) for name in names)
    if stage.name == "ppo":
        scorer = load_file(Path(qwen[1]) / "model.safetensors")
        for own in (command.model.value.hf, command.model.reward.model.hf):
            assert all(torch.equal(own.state_dict()[name], scorer[name].float()) for name in scorer)
    # And the whole file, precision and all, trains.
    small = ["--trainer.accelerator=cpu", "--trainer.val_check_interval=1.0", *SMALL[stage.name]]
    trained = main(["fit", "-c", str(tmp_path / "stage.yaml"), *small])
    assert trained.trainer.precision == "bf16-mixed"
    after = load_file(tmp_path / "out" / "model" / "model.safetensors")
    assert any(not torch.equal(after[name], weights[name].float()) for name in names)
