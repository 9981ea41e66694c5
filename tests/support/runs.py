"""One optimizer step of each method in float64, in as many ways as work can be cut up.

SGD at rate 1: the change of the weights is the gradient. Run as a program this file does the same in two processes.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning import LightningDataModule, LightningModule, Trainer
from torch import Tensor

import lit_align.modules.on_policy
from lit_align import (
    DPOModule,
    FunctionReward,
    InstructionDataModule,
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
from lit_align.types import Completion
from support.tiny import norms_in_float64

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


class Scripted:
    """An engine whose answers are a function of the prompt alone, so that they do not depend on who samples them."""

    def __call__(
        self, policy: Any, prompts: Sequence[Tensor], sampling: Sampling, stop_ids: Sequence[int], seed: int
    ) -> list[list[Completion]]:
        answers = []
        for prompt in prompts:
            tail = prompt[prompt >= 20][-12:].tolist()
            both = [tail[:: 1 + k][: 3 + len(prompt) % 4 + k] for k in range(sampling.samples)]
            answers.append([Completion([*ids, 2] if k == 0 else ids, k == 0) for k, ids in enumerate(both)])
        return answers


def build(method: str, folder: str, rows: Path, **data: Any) -> tuple[LightningModule, LightningDataModule]:
    """A module in float64 and its data module."""
    network = Network(folder, dtype="float64")
    reference = Network(folder.replace("policy", "reference"), dtype="float64")
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
        module = DPOModule(network, reference=reference, cache_reference=method == "dpo_cached", **common)
        return module, PreferenceDataModule(folder, rankings, **data)
    options = {name: data.pop(name) for name in ("micro_batch_size", "layout") if name in data}
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
    module.engine = Scripted()
    return module, PromptDataModule(folder, demos, **data)


def one_step(
    method: str, folder: str, rows: Path, accumulate: int = 1, devices: int = 1, **data: Any
) -> tuple[float, dict[str, Tensor]]:
    """Loss and weights after one optimizer step."""
    torch.manual_seed(0)
    try:
        module, datamodule = build(method, folder, rows, **data)
        trainer = Trainer(
            max_steps=1,
            accelerator="cpu",
            devices=devices,
            strategy="ddp" if devices > 1 else "auto",
            precision="64-true",
            accumulate_grad_batches=accumulate,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            limit_val_batches=0,
        )
        with norms_in_float64():
            trainer.fit(module, datamodule)
    finally:
        lit_align.modules.on_policy.pack = pack
    loss = trainer.callback_metrics["ppo/policy_loss" if method.startswith("ppo") else "train/loss"]
    return float(loss), {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}


if __name__ == "__main__":
    method, folder, rows, out, options = sys.argv[1:]
    result = one_step(method, folder, Path(rows), devices=2, **json.loads(options))
    if os.environ.get("LOCAL_RANK", "0") == "0":
        torch.save(result, out)
