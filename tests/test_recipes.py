"""The recipes of experiments/recipes: every value is cited, every key is read, and every stage runs, shrunk.

What a run needs of the hub is replaced: models by tiny ones of the same architecture with random weights, data sets by
a few rows, made up, in their published columns. Batches, lengths and steps are cut; nothing else is.
"""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from support.parsers import only
from support.tiny import tiny_folder
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from lit_align.cli import AlignCLI, main
from lit_align.cli.commands import _step, experiments
from lit_align.data.data_module import TextDataModule
from lit_align.modules.base import AlignModule
from lit_align.pipeline.stages import Pipeline

FOLDER = experiments().resolve() / "recipes"
RECIPES = sorted(folder.parent for folder in FOLDER.glob("*/pipeline.yaml"))
STAGES = sorted(file for file in FOLDER.glob("*/*.yaml") if file.name != "pipeline.yaml")
WANTED = {
    "instructgpt", "ziegler2019", "n_plus_tldr", "dpo_tldr", "dpo_hh", "zephyr", "tulu3", "simpo", "minicpm",
    "gao2022", "grpo_gsm8k",
}  # fmt: skip


def named(file: Path) -> str:
    return str(file.relative_to(FOLDER))


def test_the_recipes_are_there() -> None:
    assert {folder.name for folder in RECIPES} == WANTED
    table = (FOLDER / "README.md").read_text()
    rows = dict(re.findall(r"^\| \[`(\w+)`\]\((\w+)\) \|", table, re.MULTILINE))
    assert rows == {name: name for name in WANTED}


@pytest.mark.parametrize("file", sorted(FOLDER.glob("*/*.yaml")), ids=named)
def test_a_recipe_is_short(file: Path) -> None:
    assert len(file.read_text().splitlines()) <= 60


# Citations. A file's head names its sources, each with a tag; the line of every value ends in a comment with a tag.

UNCITED = {"class_path", "out", "seed_everything"}


def uncited(text: str) -> list[str]:
    """Lines with a value and without a citation; tags that are used and not declared, and the other way round."""
    lines = text.splitlines()
    head = "\n".join(line for line in lines if line.startswith("#"))
    declared = set(re.findall(r"^# (\[\w+\]) ", head, re.MULTILINE))
    ends: dict[int, int] = {}
    values: set[int] = set()

    def visit(node: yaml.Node, key: str) -> None:
        if isinstance(node, yaml.MappingNode):
            for name, item in node.value:
                visit(item, name.value)
        elif isinstance(node, yaml.SequenceNode):
            for item in node.value:
                visit(item, key)
        elif key not in UNCITED:
            values.add(node.start_mark.line)
        ends[node.end_mark.line] = max(ends.get(node.end_mark.line, 0), node.end_mark.column)

    visit(yaml.compose(text), "")
    comments = {n: lines[n][ends[n] :].partition("#")[2] for n in values}
    used = {tag for comment in comments.values() for tag in re.findall(r"\[\w+\]", comment)}
    bare = [lines[n].strip() for n, comment in sorted(comments.items()) if not re.search(r"\[\w+\]", comment)]
    return bare + sorted(declared ^ used)


@pytest.mark.parametrize("file", STAGES, ids=named)
def test_every_value_is_cited(file: Path) -> None:
    assert uncited(file.read_text()) == []


def test_what_is_not_cited_is_found() -> None:
    head = "# What it is.\n# [P] A paper\n# [own] chosen here\n"
    cited = head + "out: x\na: 1  # [P] 2\nb: {c: 2, d: [3]}  # [own]\ne: {class_path: f}\n"
    assert uncited(cited) == []
    assert uncited(cited.replace("  # [P] 2", "  # two")) == ["a: 1  # two", "[P]"]
    assert uncited(cited.replace("  # [own]\n", "\n")) == ["b: {c: 2, d: [3]}", "[own]"]
    assert uncited(cited.replace("[P] 2", "[Q] 2")) == ["[P]", "[Q]"]
    # A number sign inside of a value is no comment.
    assert uncited(cited.replace("1  # [P] 2", '"# [P]"')) == ['a: "# [P]"', "[P]"]


# Runs.

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "EleutherAI/pythia-70m": ("gpt_neox", {}),
    "EleutherAI/pythia-1.4b": ("gpt_neox", {}),
    "EleutherAI/pythia-1b-deduped": ("gpt_neox", {}),
    "EleutherAI/pythia-2.8b": ("gpt_neox", {}),
    "gpt2": ("gpt2", {}),
    "mistralai/Mistral-7B-v0.1": ("mistral", {"num_key_value_heads": 2}),
    "meta-llama/Llama-3.1-8B": ("llama", {"num_key_value_heads": 2}),
    "princeton-nlp/Llama-3-Base-8B-SFT": ("llama", {"num_key_value_heads": 2}),
    "HuggingFaceTB/SmolLM2-135M": ("llama", {"num_key_value_heads": 2}),
    "Qwen/Qwen2.5-0.5B-Instruct": ("qwen2", {"num_key_value_heads": 2}),
}
SCORERS = {
    "allenai/Llama-3.1-Tulu-3-8B-RM": ("llama", {"num_key_value_heads": 2}),
    "Skywork/Skywork-Reward-Llama-3.1-8B-v0.2": ("llama", {"num_key_value_heads": 2}),
}


def said(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


POST = "SUBREDDIT: r/bees\n\nTITLE: A bee {i}\n\nPOST: I saw {i} bees.\n\nTL;DR:"
PAIR = {
    "prompt": "Say a bee {i}.",
    "prompt_id": "x{i}",
    "chosen": said("Say a bee {i}.", "A bee {i}."),
    "rejected": said("Say a bee {i}.", "No."),
    "messages": said("Say a bee {i}.", "A bee {i}."),
    "score_chosen": 8.0,
    "score_rejected": 3.0,
}
ROWS: dict[str, dict[str, Any]] = {
    "HuggingFaceH4/no_robots": {
        "prompt": "Say a bee {i}.",
        "prompt_id": "x{i}",
        "messages": said("Say a bee {i}.", "A bee {i}."),
        "category": "Generation",
    },
    "berkeley-nest/Nectar": {
        "prompt": "\n\nHuman: Say a bee {i}.\n\nAssistant: ",
        "answers": [{"answer": f"A bee {{i}}{'!' * k}", "model": "x", "rank": float(k + 1)} for k in range(7)],
        "turns": 1,
        "num_responses": 7,
        "source": ["x"],
        "good_natured": True,
    },
    "JeanKaddour/minipile": {"text": "Bee {i} of the sea. " * 3},
    "HuggingFaceFW/fineweb-edu": {"text": "Bee {i} of the sea. " * 3, "id": "x{i}", "score": 3.1, "token_count": 9},
    "Open-Orca/SlimOrca": {
        "conversations": [
            {"from": "system", "value": "Be brief.", "weight": None},
            {"from": "human", "value": "Say a bee {i}.", "weight": 0.0},
            {"from": "gpt", "value": "A bee {i}.", "weight": 1.0},
        ]
    },
    "trl-lib/tldr": {"prompt": POST, "completion": " {i} bees."},
    "trl-lib/tldr-preference": {"prompt": POST, "chosen": " {i} bees.", "rejected": " No."},
    "Anthropic/hh-rlhf": {
        "chosen": "\n\nHuman: Say a bee {i}.\n\nAssistant: Which?\n\nHuman: That.\n\nAssistant: A bee {i}.",
        "rejected": "\n\nHuman: Say a bee {i}.\n\nAssistant: Which?\n\nHuman: That.\n\nAssistant: No.",
    },
    "HuggingFaceH4/ultrachat_200k": {
        "prompt": "Say a bee {i}.",
        "prompt_id": "x{i}",
        "messages": said("Say a bee {i}.", "A bee.", "And {i}?", "Another."),
    },
    "HuggingFaceH4/ultrafeedback_binarized": PAIR,
    "allenai/tulu-3-sft-mixture": {"id": "x{i}", "messages": said("Say a bee {i}.", "A bee."), "source": "x"},
    "allenai/llama-3.1-tulu-3-8b-preference-mixture": {
        "id": "x{i}",
        "prompt": "Say a bee {i}.",
        "chosen": PAIR["chosen"],
        "rejected": PAIR["rejected"],
        "source": "x",
    },
    "allenai/RLVR-GSM": {
        "messages": said("Question: 1 bee and {i} bees?\nAnswer:"),
        "ground_truth": "{i}",
        "dataset": "gsm8k",
    },
    "openai/gsm8k": {"question": "0 bees and {i} bees?", "answer": "0 + {i} = <<0+{i}={i}>>{i} bees.\n#### {i}"},
}


def filled(value: Any, i: int) -> Any:
    if isinstance(value, dict):
        return {key: filled(item, i) for key, item in value.items()}
    if isinstance(value, list):
        return [filled(item, i) for item in value]
    return value.replace("{i}", str(i)) if isinstance(value, str) else value


class Hub:
    """Tiny models and few rows under the names of the public ones, made when first asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def model(self, name: str) -> str:
        architecture, changes = (MODELS | SCORERS)[name]
        folder = self.folder / f"{architecture}{'-scorer' * (name in SCORERS)}"
        if not folder.exists():
            tiny_folder(folder, architecture, **changes)
            if name in SCORERS:
                torch.manual_seed(1)
                AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1).save_pretrained(folder)
        return str(folder)

    def rows(self, name: str) -> str:
        file = self.folder / f"{name.replace('/', '-')}.jsonl"
        file.write_text("".join(json.dumps(filled(ROWS[name], i)) + "\n" for i in range(8)))
        return str(file)

    def labels(self) -> str:
        """OpenAI's labels, in tokens of the tiny GPT-2."""
        tokenizer = AutoTokenizer.from_pretrained(self.model("gpt2"))

        def ids(text: str) -> list[int]:
            return tokenizer(text, add_special_tokens=False)["input_ids"]

        rows = [
            {"query": ids(f"Bee {i}."), **{f"sample{k}": ids(f" It is {k}") for k in range(4)}, "best": i % 4}
            for i in range(8)
        ]
        (self.folder / "offline_5k.json").write_text(json.dumps(rows))
        return str(self.folder / "offline_5k.json")

    def local(self, value: Any) -> Any:
        """A configuration without the hub."""
        if isinstance(value, dict) and "hub" in value:
            kept = {key: item for key, item in value.items() if key not in ("hub", "split", "subset")}
            return {**kept, "path": self.rows(value["hub"])}
        if isinstance(value, dict):
            return {key: self.local(item) for key, item in value.items()}
        if isinstance(value, list):
            return [self.local(item) for item in value]
        if value in MODELS or value in SCORERS:
            return self.model(value)
        return self.labels() if isinstance(value, str) and value.startswith("hf://") else value


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Hub:
    return Hub(tmp_path_factory.mktemp("hub"))


# What makes a run long, and how much of it is left.
SMALL: dict[str, Callable[[Any], Any]] = {
    "epochs": lambda n: min(n, 2),
    "mini_batches": lambda n: min(n, 2),
    "micro_batch_size": lambda n: 2,
    "max_new_tokens": lambda n: 4,
    "samples": lambda n: 2,
    "batch_size": lambda n: 4,
    "val_batch_size": lambda n: 4,
    "max_length": lambda n: min(n, 256),
    "row_tokens": lambda n: 512,
    "micro_batch_tokens": lambda n: 1024,
    "accumulate_grad_batches": lambda n: 1,
    "val_check_interval": lambda n: 1,
    "accelerator": lambda name: "cpu",
    "devices": lambda n: 1,
}


def shrunk(value: Any) -> Any:
    if isinstance(value, dict):
        scalars = {key: SMALL[key](item) for key, item in value.items() if key in SMALL and not isinstance(item, dict)}
        return {key: scalars.get(key, shrunk(item)) for key, item in value.items()}
    return [shrunk(item) for item in value] if isinstance(value, list) else value


def small(config: dict[str, Any]) -> dict[str, Any]:
    """A fit of two optimizer steps, or two iterations of PPO."""
    config = shrunk(config)
    own = config["model"]["init_args"]
    steps = 2 * own["epochs"] * own["mini_batches"] if "epochs" in own else 2
    config["trainer"] |= {"max_steps": steps, "limit_val_batches": 1, "enable_progress_bar": False}
    return config


# Options under other names in the object that has them.
ALIASES = {
    "value": "value_network",
    "reference": "reference_network",
    "loss": "loss_name",
    "beta": "loss_options",
    "coefficients": "loss_options",
    "tokenizer": "tokenizer_name",
    "train": "sources",
    "val": "sources",
    "predict": "sources",
}


class Reads:
    """What is read of modules and data modules while a command runs; not while they are made and checked."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.seen: set[str] = set()
        self.running = False
        for kind in (AlignModule, TextDataModule):
            patch.setattr(kind, "__getattribute__", self.reader(kind), raising=False)
        run = AlignCLI._run_subcommand

        def run_subcommand(cli: AlignCLI, subcommand: str) -> None:
            self.seen, self.running = set(), True
            try:
                run(cli, subcommand)
            finally:
                self.running = False

        patch.setattr(AlignCLI, "_run_subcommand", run_subcommand)

    def reader(self, kind: type) -> Callable[[Any, str], Any]:
        def getattribute(instance: Any, name: str) -> Any:
            if self.running:
                self.seen.add(f"{'model' if kind is AlignModule else 'data'}.{name}")
            return object.__getattribute__(instance, name)

        return getattribute

    def unread(self, config: dict[str, Any]) -> list[str]:
        """Options of a configuration that nothing has looked at."""
        given = [f"{part}.{name}" for part in ("model", "data") for name in config[part]["init_args"]]
        given += [f"data.{name}" for name in config["data"]["init_args"].get("ptx", {}).get("init_args", {})]
        # Of the options of the loop the Trainer's own are Lightning's business.
        return [
            name
            for name in given
            if name not in self.seen
            and f"{name.partition('.')[0]}.{ALIASES.get(name.partition('.')[2])}" not in self.seen
        ]


@pytest.fixture
def reads() -> Iterator[Reads]:
    with pytest.MonkeyPatch.context() as patch:
        yield Reads(patch)


def run(kind: str, file: Path, reads: Reads, more: list[str]) -> list[str]:
    """Run a stage; what it did not read."""
    with pytest.MonkeyPatch.context() as patch:
        only(kind, patch)
        command = main([kind, "-c", str(file), *more])
    config = yaml.safe_load(file.read_text())
    if kind == "fit":
        assert command.trainer.global_step == config["trainer"]["max_steps"]
        with (Path(command.config.fit.out) / "metrics.csv").open(newline="") as metrics:
            losses = [
                float(row[name]) for row in csv.DictReader(metrics) for name in row if "loss" in name and row[name]
            ]
        assert losses
        assert all(map(math.isfinite, losses))
    return reads.unread(config)


def by_length(folder: Path) -> Any:
    """A recipe; those of three stages and more are slow."""
    stages = yaml.safe_load((folder / "pipeline.yaml").read_text())["stages"]
    return pytest.param(folder, id=folder.name, marks=[pytest.mark.slow] if len(stages) > 2 else [])


@pytest.mark.parametrize("folder", [by_length(folder) for folder in RECIPES])
def test_a_recipe_runs(folder: Path, hub: Hub, reads: Reads, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIT_ALIGN_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    told = yaml.safe_load((folder / "pipeline.yaml").read_text())
    for file in folder.glob("*.yaml"):
        config = yaml.safe_load(file.read_text())
        config = (
            small(hub.local(config)) if {"fit": file.name} in told["stages"].values() else shrunk(hub.local(config))
        )
        Path(file.name).write_text(yaml.safe_dump(config, sort_keys=False))
    unread = {}

    def command(kind: str, file: Path, more: list[str]) -> None:
        unread[file.parent.name] = run(kind, file, reads, more)

    pipeline = Pipeline("pipeline.yaml", tmp_path / "out")
    pipeline.run(command, _step, lambda text: None)
    assert {stage: options for stage, options in unread.items() if options} == {}
    for stage in pipeline.stages:
        if stage.kind == "fit":
            assert (tmp_path / "out" / stage.name / "model" / "model.safetensors").exists()


def test_an_option_that_a_run_never_reads_is_found(
    hub: Hub, reads: Reads, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIT_ALIGN_CACHE", str(tmp_path / "cache"))
    config = small(hub.local(yaml.safe_load((FOLDER / "grpo_gsm8k" / "grpo.yaml").read_text())))
    config["model"]["init_args"] |= {"lambda_": 0.9, "kl_horizon": 5}
    config["out"] = str(tmp_path / "out")
    (tmp_path / "stage.yaml").write_text(yaml.safe_dump(config))
    assert set(run("fit", tmp_path / "stage.yaml", reads, [])) == {"model.lambda_", "model.kl_horizon"}
