"""lit_align, timed: `python ours.py METHOD MODEL STEPS key=value ...` prints one JSON line.

The ordinary modules and data modules under a Lightning Trainer; the first two steps are left out, of PPO the first
iteration. In the first of them the products that the model takes are counted. With `profile=true` the rest is profiled
and not timed: the share of each operation is printed before the line. With `phases=true`, of PPO and GRPO, the share of
each phase of an iteration is. With `lora=true` adapters are trained, and PPO's four models are one. `head=torch` or
`head=liger` computes log-probabilities by another's kernel, where it can.
"""

from __future__ import annotations

import functools
import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from lightning import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from phases import Phases
from torch.profiler import profile
from torch.utils.flop_counter import FlopCounterMode

import lit_align as la
from lit_align.modules.base import AlignModule
from lit_align.modules.policy import PolicyModule
from lit_align.rewards import ModelReward
from lit_align.types import PackedBatch

WARM_UP = 2
SAMPLES = 4  # answers to a prompt, for GRPO; `batch` counts answers


class Clock(Callback):
    """Seconds from the end of the warm-up to the end of training, FLOPs of the first batch, the largest forward."""

    def __init__(self, warm_up: int) -> None:
        self.warm_up = warm_up
        self.started = self.ended = 0.0
        self.batches = 0
        self.flops = FlopCounterMode(display=False)
        self.most_tokens = self.most_scored = 0

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Listen to what the policy is given."""
        if isinstance(module, PolicyModule):
            module.policy.register_forward_pre_hook(self._count)

    def _count(self, policy: torch.nn.Module, call: tuple[PackedBatch, ...]) -> None:
        self.most_tokens = max(self.most_tokens, call[0].tokens_RN.numel())
        self.most_scored = max(self.most_scored, call[0].num_scored)

    def on_train_batch_start(self, *call: Any) -> None:
        """Count what the first batch takes."""
        if self.batches == 0:
            self.flops.__enter__()

    def on_train_batch_end(self, *call: Any) -> None:
        """Count batches."""
        if self.batches == 0:
            self.flops.__exit__(None, None, None)
        self.batches += 1
        self.ended = time.perf_counter()
        if self.batches == self.warm_up:
            self.started = self.ended


def shares(profiled: profile) -> str:
    """The operations that take most of the time, each with its share."""
    events = sorted(profiled.key_averages(), key=lambda event: -event.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in events)
    return "\n".join(f"{event.self_cpu_time_total / total:6.1%}  {event.key}" for event in events[:20])


def rss_mb() -> int:
    """The most memory that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def length(rows: list[dict], completions: list[str]) -> list[float]:
    """A reward that costs nothing."""
    return [float(len(text) % 17) for text in completions]


def source(assets: Path, name: str, count: int) -> list[la.Source]:
    """The first rows of a file: both sides use the same, all of them, once."""
    return [la.Source(str(assets / f"{name}.jsonl"), limit=count)]


def build(
    method: str, assets: Path, model: str, steps: int, o: dict[str, Any]
) -> tuple[AlignModule, LightningDataModule]:
    """The module and the data of a method."""
    place = str(assets / model)
    how = {"attention": o["attention"] or None, "compile": o["compile"], "head": o["head"]}
    network = functools.partial(la.Network, place, weights="pretrained", **how)
    optimizer = functools.partial(torch.optim.AdamW, lr=1e-5 if method == "ppo" else 1e-4, weight_decay=0.0, fused=True)
    size = o["batch"]
    data = {"batch_size": size, "max_length": o["max_length"], "row_tokens": o["row_tokens"], "val_fraction": 0.0}
    policy = network(lora=la.Lora()) if o["lora"] else network()
    if method == "sft":
        return la.SFTModule(policy, optimizer=optimizer), la.InstructionDataModule(
            place, source(assets, "sft", steps * size), **data
        )
    if method in ("dpo", "reward"):
        module: AlignModule = (
            la.DPOModule(policy, optimizer=optimizer, cache_reference=o["cached"])
            if method == "dpo"
            else la.RewardModule(policy, optimizer=optimizer)
        )
        return module, la.PreferenceDataModule(place, source(assets, "pairs", steps * size), **data)
    if method == "grpo":
        module = la.PPOModule(
            policy, la.FunctionReward(length), advantage="grpo", epochs=1, micro_batch_size=size, optimizer=optimizer,
            kl_coef=0.0, sampling=la.Sampling(max_new_tokens=o["new_tokens"], samples=SAMPLES),
        )  # fmt: skip
        data["batch_size"] = size // SAMPLES
        return module, la.PromptDataModule(place, source(assets, "prompts", steps * size // SAMPLES), **data)
    roles = (
        (
            la.Network(str(assets / f"{model}-reward-adapter"), shared=True),
            la.Network(place, lora=la.Lora(), shared=True),
        )
        if o["lora"]
        else (la.Network(str(assets / f"{model}-reward")), la.Network(place))
    )
    module = la.PPOModule(
        policy, reward=ModelReward(roles[0]), value=roles[1],
        sampling=la.Sampling(max_new_tokens=o["new_tokens"]), epochs=4, mini_batches=1,
        micro_batch_size=o["micro_batch"], optimizer=optimizer,
    )  # fmt: skip
    return module, la.PromptDataModule(place, source(assets, "prompts", steps * size), **data)


def main() -> None:
    """Train and print."""
    method, model, steps = sys.argv[1], sys.argv[2], int(sys.argv[3])
    o: dict[str, Any] = {
        "assets": ".", "batch": 8, "max_length": 512, "row_tokens": 1024, "device": "cpu", "new_tokens": 48,
        "micro_batch": 32, "lora": False, "threads": 2, "attention": "", "compile": False, "cached": False,
        "profile": False, "phases": False, "head": "own",
    }  # fmt: skip
    for text in sys.argv[4:]:
        key, value = text.split("=", 1)
        o[key] = type(o[key])(json.loads(value)) if not isinstance(o[key], str) else value
    if o["device"] == "cpu":
        torch.set_num_threads(o["threads"])
    torch.manual_seed(0)
    start = rss_mb()
    module: LightningModule
    module, data = build(method, Path(o["assets"]), model, steps, o)
    clock = Clock(WARM_UP if method != "ppo" else 1)
    phases = Phases()
    trainer = Trainer(
        max_epochs=1, accelerator="gpu" if o["device"] == "cuda" else "cpu", devices=1, logger=False,
        callbacks=[clock, *([phases] if o["phases"] else [])],
        precision="bf16-mixed" if o["device"] == "cuda" else "32-true", enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        gradient_clip_val=None if method in ("ppo", "grpo") else 1.0,
    )  # fmt: skip
    if o["profile"]:
        with profile() as profiled:
            trainer.fit(module, data)
        print(shares(profiled))
    else:
        trainer.fit(module, data)
    if o["phases"]:
        print(phases)
    seconds = clock.ended - clock.started
    figures = {
        "side": "lit_align", "method": method, "model": model, "seconds": round(seconds, 3),
        "examples_per_s": (clock.batches - clock.warm_up) * o["batch"] / seconds,
        "gflop_per_example": round(clock.flops.get_total_flops() / o["batch"] / 1e9, 3),
        "most_tokens": clock.most_tokens, "most_scored": clock.most_scored,
        "start_rss_mb": start, "peak_rss_mb": rss_mb(),
        "peak_gpu_mb": torch.cuda.max_memory_allocated() >> 20 if o["device"] == "cuda" else 0,
        "versions": {"torch": torch.__version__, "lit_align": la.__version__},
    }  # fmt: skip
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
