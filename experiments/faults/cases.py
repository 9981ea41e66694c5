"""The runs that are broken off: the four modules on a sandbox of the smallest size, each with four ways to save."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch and the tokenizers read them
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"

import json
import random
from pathlib import Path
from typing import Any

import torch
import yaml

from lit_align import Network
from lit_align.data.rows import user
from lit_align.models import export, load_causal_lm, load_tokenizer
from lit_align.sandbox.annotators import Annotators
from lit_align.sandbox.sources import prompt_row
from lit_align.sandbox.steps import SeedModel
from lit_align.sandbox.texts import demonstrations
from lit_align.sandbox.world import World

METHODS = ("sft", "reward", "dpo", "ppo")
BATCHES = 8  # in two epochs

# How a run saves and validates: PPO takes four optimizer steps a batch, and accumulates nothing.
WAYS: dict[str, dict[str, Any]] = {
    "after each validation": {"val_check_interval": 2},
    "between validations": {"val_check_interval": 3, "save_every": 1},
    "accumulating": {"val_check_interval": 4, "accumulate": 2, "save_every": 1},
    "without validation, a worker": {"limit_val_batches": 0, "num_workers": 1, "log_every_n_steps": 2},
}


def prepare(place: Path) -> None:
    """A model with random weights, and demonstrations, rankings and prompts of the sandbox."""
    torch.manual_seed(0)
    SeedModel(hidden_size=16, layers=1, heads=2, intermediate_size=24).run(place / "seed")
    seed = str(place / "seed" / "model")
    export(load_causal_lm(Network(seed, weights="random")), load_tokenizer(seed), place / "model")
    world, rng = World(0), random.Random(0)
    told = list(demonstrations(world, rng, 24, 0.3))
    demos = [{**prompt_row(prompt), "completion": answer} for prompt, answer in told]
    rankings = []
    for number, (prompt, answer) in enumerate(told[:20]):
        answers = [answer, told[number - 1][1], told[number - 2][1]][: 2 + number % 2]
        ranks = Annotators().rank(world, prompt, answers, [True] * len(answers), rng)
        rankings.append({"prompt": user(prompt.text), "completions": answers, "ranks": ranks})
    prompts = [prompt_row(prompt) for prompt, _ in told]
    for name, rows in {"demos": demos, "rankings": rankings, "prompts": prompts}.items():
        (place / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def configuration(place: Path, method: str, way: str, out: Path) -> dict[str, Any]:
    """A fit of eight batches."""
    options = dict(WAYS[way])
    steps = 4 if method == "ppo" else 1
    accumulate = options.pop("accumulate", 1)
    accumulate = 1 if method == "ppo" else accumulate
    save_every, workers = options.pop("save_every", None), options.pop("num_workers", 0)
    folder = str(place / "model")
    model: dict[str, Any] = {
        "network": {"name": folder, "dropout": 0.1 if method in ("sft", "reward") else None},
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}},
        "schedule": {"class_path": "lit_align.modules.Cosine", "init_args": {"warmup": 2}},
    }
    if method == "ppo":
        model |= {"reward": {"class_path": "lit_align.sandbox.gold_reward.GoldReward"}, "epochs": 2, "mini_batches": 2}
        model |= {"micro_batch_size": 4, "kl_target": 0.01, "kl_horizon": 50}
        model |= {"sampling": {"max_new_tokens": 6, "samples": 2}}
    classes = {"sft": ("SFT", "Instruction"), "reward": ("Reward", "Preference"), "dpo": ("DPO", "Preference")}
    kind, data = classes.get(method, ("PPO", "Prompt"))
    rows = str(place / {"Instruction": "demos.jsonl", "Preference": "rankings.jsonl", "Prompt": "prompts.jsonl"}[data])
    return {
        "out": str(out),
        "model": {"class_path": f"lit_align.{kind}Module", "init_args": model},
        "data": {
            "class_path": f"lit_align.{data}DataModule",
            "init_args": {
                "tokenizer": folder,
                "train": [{"path": rows}],
                "val": [{"path": rows, "limit": 4}],
                "batch_size": 5 if data == "Preference" else 6,
                "num_workers": workers,
            },
        },
        "checkpoint": {} if save_every is None else {"every_n_train_steps": save_every * steps},
        "trainer": {
            "accelerator": "cpu",
            "max_steps": BATCHES * steps // accumulate,
            "accumulate_grad_batches": accumulate,
            "enable_progress_bar": False,
            **options,
        },
    }


def write(place: Path, method: str, way: str, out: Path) -> Path:
    """The configuration as a file beside its folder."""
    file = out.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(configuration(place, method, way, out)))
    return file
