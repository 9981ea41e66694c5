"""Configurations of small runs through the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

METHODS = ("sft", "reward", "dpo", "ppo")

MODULES = {"sft": "SFTModule", "reward": "RewardModule", "dpo": "DPOModule", "ppo": "PPOModule"}
DATA = {
    "sft": ("InstructionDataModule", "demos.json"),
    "reward": ("PreferenceDataModule", "rankings.json"),
    "dpo": ("PreferenceDataModule", "rankings.json"),
    "ppo": ("PromptDataModule", "demos.json"),
}


def config(method: str, folder: str, rows: Path, out: Path, **trainer: Any) -> dict[str, Any]:
    """A fit of a few batches on the rows of `support.runs.write_rows`."""
    model: dict[str, Any] = {
        "network": {"name": folder},
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}},
        "schedule": {"class_path": "lit_align.modules.Cosine", "init_args": {"warmup": 2}},
    }
    if method == "ppo":
        reward = {"class_path": "lit_align.FunctionReward", "init_args": {"function": "support.runs.echo"}}
        model |= {"reward": reward, "epochs": 2, "mini_batches": 2, "micro_batch_size": 2, "kl_target": 0.01}
        model |= {"kl_horizon": 50, "sampling": {"max_new_tokens": 6, "samples": 2}}
    data_class, file = DATA[method]
    return {
        "out": str(out),
        "model": {"class_path": f"lit_align.{MODULES[method]}", "init_args": model},
        "data": {
            "class_path": f"lit_align.{data_class}",
            "init_args": {
                "tokenizer": folder,
                "train": [{"path": str(rows / file)}],
                "val": [{"path": str(rows / file)}],
                "batch_size": 2 if method != "ppo" else 4,
            },
        },
        "trainer": {"accelerator": "cpu", **trainer},
    }
