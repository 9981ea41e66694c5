"""One optimizer step of each method in float64, in as many ways as work can be cut up.

SGD at rate 1: the change of the weights is the gradient.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from lightning import LightningDataModule, LightningModule, Trainer
from torch import Tensor

import lit_align.modules.on_policy
from lit_align import (
    DPOModule,
    FunctionReward,
    InstructionDataModule,
    Lora,
    Network,
    PPOModule,
    PreferenceDataModule,
    PromptDataModule,
    RewardModule,
    Sampling,
    SFTModule,
    Source,
)
from lit_align.functional.packing import pack
from lit_align.models.sharding import here, whole
from lit_align.types import Completion
from support.tiny import norms_in_float64

Result = tuple[float, dict[str, Tensor], dict[str, float]]
METHODS = ("sft", "reward", "dpo", "dpo_cached", "ppo", "ppo_separate_value")
# Policy optimisation without a value model, every way to aggregate a loss among them.
ESTIMATORS: dict[str, dict[str, Any]] = {
    "ppo_rloo": {"advantage": "rloo"},
    "ppo_grpo": {"advantage": "grpo", "kl_in": "loss", "kl_estimator": "k3", "aggregation": "sequence"},
    "ppo_dr_grpo": {"advantage": "dr_grpo", "aggregation": "constant", "clip_high": 0.28, "dual_clip": 3.0},
    "ppo_reinforce++": {"advantage": "reinforce++", "aggregation": "sequence"},
    "ppo_reinforce++_baseline": {"advantage": "reinforce++_baseline", "kl_in": "loss", "kl_estimator": "k2"},
    "ppo_remax": {"advantage": "remax"},
}
# Reward models that learn from more than ranks.
TARGETS: dict[str, dict[str, Any]] = {
    "reward_shares": {"label_smoothing": 0.1, "centering": 0.01},
    "reward_regression": {"loss": "regression"},
}
# Supervised losses beside the plain one.
SUPERVISED: dict[str, dict[str, Any]] = {"sft_dft": {"loss": "dft"}, "sft_neftune": {"neftune_alpha": 5.0}}
# Ways to hold the model; they follow a method's name after a colon; so does an engine that is silent.
NETWORKS: dict[str, dict[str, Any]] = {
    "lora": {"lora": Lora(r=4)},
    "recomputed": {"activation_checkpointing": True},
}
WORDS = "a bee sea dee eh eff gee".split()


def write_rows(folder: Path) -> None:
    """Eight ragged examples of each kind."""
    texts = [" ".join(WORDS[: 1 + i % 7]) for i in range(8)]
    demos = [{"instruction": f"say {text}", "output": text * (1 + i % 3)} for i, text in enumerate(texts)]
    rankings = [
        {
            "prompt": [{"role": "user", "content": f"rank {text}"}],
            "completions": [text, text[::-1] + "!", "no"][: 2 + i % 2],
            "ranks": [1, 0, 2][: 2 + i % 2],
        }
        for i, text in enumerate(texts)
    ]
    judged: list[dict[str, Any]] = [dict(row) for row in rankings]
    for i, row in enumerate(judged):
        k = len(row["ranks"])
        row["scores"] = [(i * 3 + j * 5) % 7 - 3.0 for j in range(k)]
        if i % 3:  # the others are judged by one
            row["ranks"] = [row["ranks"], list(range(k)), [0] * k][: 2 + i % 2]
    (folder / "judged.json").write_text(json.dumps(judged))
    (folder / "demos.json").write_text(json.dumps(demos))
    (folder / "rankings.json").write_text(json.dumps(rankings))


def echo(rows: list[dict], completions: list[str]) -> list[float]:
    """A reward that differs from answer to answer."""
    return [len(text) % 5 - 0.1 * len(str(row["prompt"])) % 3 for row, text in zip(rows, completions, strict=True)]


def fails(rows: list[dict], completions: list[str]) -> list[float]:
    """A reward that raises."""
    raise ValueError("the reward is broken")


class Scripted:
    """An engine whose answers are a function of the prompt alone, so that they do not depend on who samples them.

    Args:
        silent: prompts that it answers with nothing.
    """

    def __init__(self, silent: Sequence[Tensor] = ()) -> None:
        self.silent = {tuple(prompt.tolist()) for prompt in silent}

    def __call__(
        self, policy: Any, prompts: Sequence[Tensor], sampling: Sampling, stop_ids: Sequence[int], seed: int
    ) -> list[list[Completion]]:
        answers = []
        for prompt in prompts:
            if tuple(prompt.tolist()) in self.silent:
                answers.append([Completion([], False)] * sampling.samples)
                continue
            tail = prompt[prompt >= 20][-12:].tolist()
            both = [tail[:: 1 + k][: 3 + len(prompt) % 4 + k] for k in range(sampling.samples)]
            answers.append([Completion([*ids, 2] if k == 0 else ids, k == 0) for k, ids in enumerate(both)])
        return answers


def build(
    method: str, folder: str, rows: Path, dtype: Any = "float64", **data: Any
) -> tuple[LightningModule, LightningDataModule]:
    """A module, in float64 unless told otherwise, and its data module."""
    method, _, held = method.partition(":")
    network = Network(folder, dtype=dtype, **NETWORKS.get(held, {}))
    reference = Network(folder.replace("policy", "reference"), dtype=dtype)
    common: dict[str, Any] = {"optimizer": functools.partial(torch.optim.SGD, lr=1.0)}
    data = {"val_fraction": 0.0, "cache_dir": "none", **data}
    demos, rankings = [Source(str(rows / "demos.json"))], [Source(str(rows / "rankings.json"))]
    if method.startswith("sft"):
        return SFTModule(network, **SUPERVISED.get(method, {}), **common), InstructionDataModule(folder, demos, **data)
    if method in TARGETS:
        judged = [Source(str(rows / "judged.json"))]
        return RewardModule(network, **TARGETS[method], **common), PreferenceDataModule(
            folder, judged, keep_ties=True, **data
        )
    if method == "reward":
        return RewardModule(network, centering=0.01, **common), PreferenceDataModule(folder, rankings, **data)
    if method.startswith("dpo"):
        reference = None if held == "lora" else reference
        module = DPOModule(network, reference=reference, cache_reference=method == "dpo_cached", **common)
        return module, PreferenceDataModule(folder, rankings, **data)
    options = {name: data.pop(name) for name in ("micro_batch_size", "micro_batch_tokens", "layout") if name in data}
    if "layout" in options:
        lit_align.modules.on_policy.pack = functools.partial(pack, **options.pop("layout"))
    module = PPOModule(
        network,
        FunctionReward(echo),
        reference=reference,
        value=reference if method == "ppo_separate_value" else None,
        epochs=1,
        max_grad_norm=None,
        sampling=Sampling(max_new_tokens=8, samples=2),
        **ESTIMATORS.get(method, {}),
        **options,
        **common,
    )
    module.engine = Scripted(second_share(folder, demos) if held == "silent" else ())
    return module, PromptDataModule(folder, demos, **data)


def second_share(folder: str, demos: list[Source]) -> list[Tensor]:
    """The prompts of the second of two processes."""
    data = PromptDataModule(folder, demos, val_fraction=0.0, cache_dir="none", batch_size=4)
    data.trainer = SimpleNamespace(world_size=2, global_rank=1)
    data.setup("fit")
    return next(iter(data.train_dataloader())).prompts


def one_step(
    method: str,
    folder: str,
    rows: Path,
    accumulate: int = 1,
    devices: int = 1,
    strategy: str = "auto",
    held_out: int = 0,
    clip: float | None = None,
    precision: Any = "64-true",
    **data: Any,
) -> Result:
    """Loss and weights after one optimizer step, and what was logged; `held_out` rows are validated on after it."""
    # An earlier command in this process leaves its seed there, and Lightning seeds again with it where a strategy has
    # several processes.
    os.environ.pop("PL_GLOBAL_SEED", None)
    torch.manual_seed(0)
    try:
        if held_out:
            name = "judged" if method in TARGETS else "rankings" if method.startswith(("reward", "dpo")) else "demos"
            told = json.loads((rows / f"{name}.json").read_text())
            (rows / f"{name}-{held_out}.json").write_text(json.dumps(told[:held_out]))
            data |= {"val": [Source(str(rows / f"{name}-{held_out}.json"))], "val_batch_size": 2}
        module, datamodule = build(method, folder, rows, **data)
        trainer = Trainer(
            max_steps=1,
            accelerator="cpu",
            devices=devices,
            strategy=strategy,
            precision=precision,
            accumulate_grad_batches=accumulate,
            gradient_clip_val=clip,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            limit_val_batches=1.0 if held_out else 0,
        )
        with norms_in_float64():
            trainer.fit(module, datamodule)
    finally:
        lit_align.modules.on_policy.pack = pack
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    parameters = [p for name, p in module.named_parameters() if ".layers." in name or ".h." in name]
    metrics["held"] = sum(here(p).numel() for p in parameters) / sum(p.numel() for p in parameters)
    weights = {name: whole(p.detach()).clone() for name, p in module.named_parameters() if p.requires_grad}
    return metrics["ppo/policy_loss" if method.startswith("ppo") else "train/loss"], weights, metrics
