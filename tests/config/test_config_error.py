"""Every mistake in a configuration ends in one line that names the key and what it accepts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning import LightningModule
from support.configs import config
from support.parsers import only
from support.runs import write_rows
from support.tiny import tiny_folder

from lit_align.cli.entry import main
from lit_align.config.errors import ConfigError, explain

Write = Callable[..., list[str]]


class Alien(LightningModule):
    """Not ours, and so not suggested."""


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A model and rows; nothing here is written to."""
    folder = tmp_path_factory.mktemp("parts")
    write_rows(folder)
    return tiny_folder(folder / "model"), folder


@pytest.fixture
def written(parts: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """The command line of a fit that is right but for one key, given as YAML or as an argument."""
    monkeypatch.setenv("LIT_ALIGN_CACHE", str(tmp_path / "cache"))
    only("fit", monkeypatch)

    def write(method: str, key: str = "", value: Any = None) -> list[str]:
        content = config(method, *parts, tmp_path / "run", max_steps=1)
        here: Any = content
        *path, last = key.split(".")
        for part in path:
            here = here.setdefault(part, {})
        if key:
            here[last] = value
        file = tmp_path / "run.yaml"
        file.write_text(yaml.safe_dump(content))
        return ["fit", "-c", str(file)]

    return write


def refused(args: list[str]) -> str:
    """The line that a command ends in."""
    with pytest.raises((ValueError, OSError)) as caught:
        main(args)
    message = str(caught.value)
    assert message
    assert "\n" not in message
    return message


MODEL, DATA = "model.init_args", "data.init_args"
MODULES = "DPOModule, PPOModule, RewardModule, SFTModule"
PRECISIONS = (
    "transformer-engine, transformer-engine-float16, 16-true, 16-mixed, bf16-true, bf16-mixed, 32-true, 64-true"
)
STOP = "lightning.pytorch.callbacks.EarlyStopping"
PROMPTS = "lit_align.sandbox.sources.Prompts"

# Method, key, wrong value; how the line begins.
IN_FILES = [
    # Wrong keys, at every depth.
    ("sft modle", 3, "unknown key 'modle', did you mean 'model'?; keys are seed_everything, trainer, model, data, out"),
    ("sft trainer.max_step", 3, "unknown key 'trainer.max_step', did you mean 'max_steps'?; keys of Trainer are"),
    ("sft checkpoint.save_lst", 3, "unknown key 'checkpoint.save_lst', did you mean 'save_last'?; keys of ModelC"),
    (f"sft {MODEL}.lr", 3, "unknown key 'model.lr'; keys of SFTModule are network, loss, neftune_alpha, sampling"),
    (f"sft {MODEL}.network.nam", 3, "unknown key 'model.network.nam', did you mean 'name'?; keys of Network are"),
    (f"sft {MODEL}.network.lora.rank", 3, "unknown key 'model.network.lora.rank'; keys of Lora are r, alpha"),
    (f"sft {MODEL}.optimizer.init_args.lrr", 3, "unknown key 'model.optimizer.lrr', did you mean 'lr'?; keys of A"),
    (f"sft {MODEL}.schedule.init_args.war", 3, "unknown key 'model.schedule.war', did you mean 'warmup'?; keys of C"),
    (f"sft {DATA}.batch_sise", 3, "unknown key 'data.batch_sise', did you mean 'batch_size'?; keys of Instruction"),
    (f"sft {DATA}.train", [{"pth": "x"}], "unknown key 'data.train.pth', did you mean 'path'?; keys of Source are"),
    (f"ppo {MODEL}.sampling.topp", 3, "unknown key 'model.sampling.topp', did you mean 'top_p'?; keys of Sampling"),
    (
        "sft trainer.callbacks",
        [{"class_path": STOP, "init_args": {"monito": "x"}}],
        "unknown key 'trainer.callbacks.monito', did you mean 'monitor'?; keys of EarlyStopping are monitor",
    ),
    (
        f"sft {DATA}.train",
        [{"rows": {"class_path": PROMPTS, "init_args": {"sed": 1}}}],
        "unknown key 'data.train.rows.sed', did you mean 'seed'?; keys of Prompts are seed, count, split, distinct",
    ),
    # Wrong types.
    ("sft trainer.max_steps", "three", "trainer.max_steps: expected int, got three"),
    ("sft seed_everything", "x", "seed_everything: expected bool or int, got x"),
    (f"sft {DATA}.batch_size", "x", "data.batch_size: expected int, got x"),
    (f"sft {DATA}.val_batch_size", "x", "data.val_batch_size: expected int or null, got x"),
    (f"sft {DATA}.train", 3, "data.train: expected list, got 3"),
    (f"sft {DATA}.train", [3], "data.train: expected a Source, by class_path and init_args or by its own keys, got 3"),
    (f"sft {DATA}.train", [{"path": "x", "limit": "y"}], "data.train.limit: expected int or null, got y"),
    (f"sft {MODEL}.network.lora.r", "x", "model.network.lora.r: expected int, got x"),
    (f"sft {MODEL}.optimizer.init_args.lr", "fast", "model.optimizer.lr: expected float, got fast"),
    ("sft trainer.callbacks", "NoCallback", "trainer.callbacks: expected list or null, got NoCallback"),
    (
        "sft model",
        3,
        "model: expected a LightningModule, by class_path and init_args or by its own keys; known here are " + MODULES,
    ),
    # Wrong choices.
    (f"sft {DATA}.truncate", "x", "data.truncate: expected one of prompt, answer, never, got x"),
    (f"sft {MODEL}.network.weights", "x", "model.network.weights: expected one of pretrained, random, got x"),
    (f"dpo {MODEL}.loss", "none", "model.loss: expected one of sigmoid, "),
    (f"ppo {MODEL}.kl_estimator", "k4", "model.kl_estimator: expected one of k1, k2, k3, k3+, got k4"),
    ("sft trainer.precision", 17, f"trainer.precision: expected one of 64, 32, 16, {PRECISIONS}, bf16 or null, got 17"),
    # Wrong classes and functions.
    (
        "sft model.class_path",
        "NoModule",
        f"model: no class or function 'NoModule', did you mean 'SFTModule'?; known here are {MODULES}, or give a full "
        "import path",
    ),
    ("sft model.class_path", "nowhere.X", f"model: no class or function 'nowhere'; known here are {MODULES}, or give"),
    ("sft data.class_path", "lit_align.No", "data: no class or function 'No'; known here are InstructionDataModule, "),
    (f"sft {MODEL}.schedule.class_path", "Cosin", "model.schedule: no class or function 'Cosin'; give a full import"),
    ("sft trainer.logger", "NoLogger", "trainer.logger: no class or function 'NoLogger'; give a full import path"),
    (f"ppo {MODEL}.reward.init_args.function", "support.runs.no", "model.reward.function: no class or function 'no'"),
    (f"ppo {MODEL}.reward.class_path", "NoReward", "model.reward: no class or function 'NoReward'; give a full"),
    (
        f"sft {DATA}.train",
        [{"rows": {"class_path": "lit_align.SFTModule"}}],
        "data.train.rows: Import path lit_align.SFTModule does not correspond to a subclass of Rows",
    ),
    # Missing keys.
    (f"sft {MODEL}.network", {}, "model: missing network.name"),
    (f"sft {DATA}", {}, "data: missing tokenizer, train"),
    ("sft trainer.logger", {"class_path": "CSVLogger"}, "trainer.logger: missing save_dir"),
    # Values that parse, and that a class refuses.
    (f"sft {MODEL}.schedule.init_args.warmup", -1, "warmup must not be negative and floor must be in [0, 1], got -1.0"),
    (f"sft {DATA}.val_fraction", 2, "val_fraction must be in [0, 1), got 2.0"),
    (f"sft {DATA}.train", [{"path": "x", "limit": 0}], "limit must be at least 1, or null for all rows, got 0"),
    (f"sft {DATA}.train", [{"path": "x", "hub": "y"}], "a source needs exactly one of path (a file), hub (a data set"),
    (f"sft {DATA}.train", [{"path": "x", "format": "y"}], "unknown format 'y': choose auto or one of alpaca, "),
    (f"ppo {MODEL}.sampling.temperature", 0, "PPO explores by sampling: set sampling.temperature above 0"),
    ("ppo trainer.gradient_clip_val", 1, "PPO clips gradients itself: unset trainer.gradient_clip_val, set model.max_"),
    ("sft trainer.accelerator", "x", "You selected an invalid accelerator name: `accelerator='x'`. Available names "),
    ("sft trainer.devices", [], "`Trainer(devices=[])` value is not a valid input using cpu accelerator."),
    # What is not there.
    (f"sft {DATA}.train", [{"path": "nofile.json"}], "no file matches 'nofile.json'"),
    (f"sft {DATA}.train", [{"path": "${NO_SUCH}/x"}], "path '${NO_SUCH}/x' needs the environment variable NO_SUCH, "),
    (f"sft {MODEL}.network.name", "nofolder", "cannot load 'nofolder' (neither a usable folder nor a name on the hub)"),
    ("sft ckpt_path", "no.ckpt", "Checkpoint file not found: no.ckpt; there is no other one"),
]


@pytest.mark.parametrize(("key", "value", "line"), IN_FILES, ids=lambda value: str(value)[:40])
def test_a_mistake_in_a_file(written: Write, tmp_path: Path, key: str, value: Any, line: str) -> None:
    assert refused(written(*key.split(), value)).startswith(line)
    # A run that never began leaves no configuration, and so does not take the name.
    assert not (tmp_path / "run" / "config.yaml").exists()


ARGUMENTS = [
    (["--modle.x=3"], "unknown key 'modle.x', did you mean 'model'?; keys are seed_everything, "),
    (["--model.lr=3"], "unknown key 'model.lr'; keys of SFTModule are network, loss, "),
    (["--model.optimizer.lrr=1"], "unknown key 'model.optimizer.lrr', did you mean 'lr'?; keys of AdamW are lr"),
    (["--model.optimizer.lr=fast"], "model.optimizer.lr: expected float, got fast"),
    (["--model=SFTModul"], "model: no class or function 'SFTModul', did you mean 'SFTModule'?; known here are DPOMod"),
    (["--data.truncate=middle"], "data.truncate: expected one of prompt, answer, never, got middle"),
    (["--data.batch_size", "x"], "data.batch_size: expected int, got x"),
    # Abbreviations are misspelt keys.
    (["--trainer.max_step=3"], "unknown key 'trainer.max_step', did you mean 'max_steps'?; keys of Trainer are "),
    (["--model.network.nam=x"], "unknown key 'model.network.nam', did you mean 'name'?; keys of Network are name"),
    (["--checkpoint.every_n=3"], "unknown key 'checkpoint.every_n', did you mean 'every_n_epochs'?; keys of Mo"),
    (["--out"], "argument --out: expected one argument"),
    (["more"], "unrecognized arguments: more"),
]


@pytest.mark.parametrize(("more", "line"), ARGUMENTS, ids=lambda value: str(value)[:40])
def test_a_mistake_in_an_argument(written: Write, more: list[str], line: str) -> None:
    assert refused([*written("sft"), *more]).startswith(line)


COMMANDS = [
    (
        ["train"],
        "unknown command 'train': choose fit, validate, test, predict, doctor, demo, pipeline, sweep, chat, report",
    ),
    (["fit"], "missing data, model"),
    (["validate", "--data=InstructionDataModule"], "data: missing tokenizer, train"),
    (["fit", "-c", "nofile.yaml"], "config: File does not exist: "),
    (["pipeline"], "the following arguments are required: file (see lit-align pipeline --help)"),
    (["pipeline", "nofile.yaml"], "cannot read nofile.yaml: [Errno 2] No such file or directory: 'nofile.yaml'"),
    (["demo", "--seed", "x"], "argument --seed: invalid int value: 'x' (see lit-align demo --help)"),
    (["demo", "--quic"], "unrecognized arguments: --quic (see lit-align demo --help)"),
    (["demo", "--set", "sft.x"], "--set wants STAGE.KEY=VALUE, got 'sft.x'"),
    (["report", "nofolder"], "nofolder is not a folder"),
]


@pytest.mark.parametrize(("args", "line"), COMMANDS, ids=lambda value: str(value)[:40])
def test_a_mistake_in_a_command(args: list[str], line: str) -> None:
    assert refused(args).startswith(line)


FILES = [
    ("out: x\nmodel: {class_path: SFTModule\ndata: 3\n", ", line 3: not valid YAML: expected ',' or '}', but got ':'"),
    ("out: x\n  seed: 3\n", ", line 2: not valid YAML: mapping values are not allowed here"),
    ("a: \0", ": not valid YAML: "),
    ("", " holds nothing, expected a mapping with the keys of a configuration"),
    ("- a\n- b\n", " holds list, expected a mapping with the keys of a configuration"),
]


@pytest.mark.parametrize(("text", "line"), FILES, ids=lambda value: str(value)[:20])
def test_a_file_that_is_no_configuration(tmp_path: Path, text: str, line: str) -> None:
    file = tmp_path / "broken.yaml"
    file.write_text(text)
    assert refused(["fit", "-c", str(file)]).startswith(f"{file}{line}")


def test_the_file_and_the_line_however_the_file_is_given(written: Write, tmp_path: Path) -> None:
    file = tmp_path / "broken.yaml"
    file.write_text("trainer:\n  max_steps: [\n")
    for flags in (["--config", str(file)], [f"--config={file}"], [f"-c{file}"]):
        assert refused([*written("sft"), *flags]).startswith(f"{file}, line 3: not valid YAML: ")


def test_what_was_given_and_nothing_more(written: Write) -> None:
    told = refused(written("sft", f"{MODEL}.optimizer.init_args.lr", "fast"))
    assert told == "model.optimizer.lr: expected float, got fast"


def test_what_is_not_understood_is_still_one_line() -> None:
    assert explain("First line,\n   and  a second") == "First line, and a second"
    assert explain('Parser key "a":\n  - Parser key "b":\n      Strange.') == "a.b: Strange."
    # A class that cannot be imported explains nothing, and does not fail either.
    problem = "Problem with given class_path 'no.such.Class':\n  Option 'x' is not accepted"
    assert explain(f'Parser key "model":\n  {problem}') == "unknown key 'model.x'"
    assert issubclass(ConfigError, ValueError)
