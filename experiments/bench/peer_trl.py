"""TRL 1.16, timed: `python peer_trl.py METHOD MODEL STEPS key=value ...` prints one JSON line.

Runs in an environment of its own (`pip install trl==1.16.0`). TRL's defaults, but for what must be equal on both sides:
examples, their number in a step, truncation, optimizer, precision. Further keys go to the method's config.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
import torch
import trl
from datasets import load_dataset
from transformers import AutoTokenizer, TrainerCallback

WARM_UP = 2
TRAINERS = {
    "sft": (trl.SFTTrainer, trl.SFTConfig, "sft"),
    "dpo": (trl.DPOTrainer, trl.DPOConfig, "pairs"),
    "reward": (trl.RewardTrainer, trl.RewardConfig, "pairs"),
    "grpo": (trl.GRPOTrainer, trl.GRPOConfig, "prompts"),
}


class Clock(TrainerCallback):
    """Seconds from the end of the warm-up to the end of training."""

    started = ended = 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Note the time."""
        self.ended = time.perf_counter()
        if state.global_step == WARM_UP:
            self.started = self.ended


def length(completions: list[list[dict[str, str]]], **columns: Any) -> list[float]:
    """A reward that costs nothing."""
    return [float(len(completion[0]["content"]) % 17) for completion in completions]


def main() -> None:
    """Train and print."""
    method, model, steps = sys.argv[1], sys.argv[2], int(sys.argv[3])
    o: dict[str, Any] = {"assets": ".", "batch": 8, "max_length": 512, "device": "cpu", "threads": 2, "new_tokens": 64}
    more: dict[str, Any] = {}
    for text in sys.argv[4:]:
        key, value = text.split("=", 1)
        (o if key in o else more)[key] = value if key in ("assets", "device") else json.loads(value)
    cuda = o["device"] == "cuda"
    if not cuda:
        torch.set_num_threads(o["threads"])
    torch.manual_seed(0)
    trainer_class, config_class, rows = TRAINERS[method]
    place = str(Path(o["assets"]) / model)
    file = str(Path(o["assets"]) / f"{rows}.jsonl")
    # Packed rows hold several examples each: all there are, that no epoch ends before the last step.
    rows_needed = "" if more.get("packing") else f"[:{steps * o['batch']}]"
    data = load_dataset("json", data_files=file, split=f"train{rows_needed}")
    # A batch of GRPO is its answers, four to a prompt.
    more |= (
        {"num_generations": 4, "max_completion_length": o["new_tokens"]}
        if method == "grpo"
        else {"max_length": o["max_length"]}
    )
    config = config_class(
        output_dir="out", per_device_train_batch_size=o["batch"], max_steps=steps,
        learning_rate=1e-4, lr_scheduler_type="constant", optim="adamw_torch_fused", weight_decay=0.0, use_cpu=not cuda,
        bf16=cuda, gradient_checkpointing=False, report_to="none", save_strategy="no", logging_steps=steps,
        disable_tqdm=True, seed=0, **more,
    )  # fmt: skip
    clock = Clock()
    rewards = {"reward_funcs": length} if method == "grpo" else {}
    trainer = trainer_class(
        model=place, args=config, train_dataset=data, processing_class=AutoTokenizer.from_pretrained(place),
        callbacks=[clock], **rewards,
    )  # fmt: skip
    trainer.train()
    seconds = clock.ended - clock.started
    packed = trainer.train_dataset["seq_lengths"] if more.get("packing") else [[0]]
    examples_a_row = sum(map(len, packed)) / len(packed)
    figures = {
        "side": "trl", "method": method, "model": model, "seconds": round(seconds, 3),
        "examples_per_s": (steps - WARM_UP) * o["batch"] * examples_a_row / seconds,
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "peak_gpu_mb": torch.cuda.max_memory_allocated() >> 20 if cuda else 0,
        "versions": {"torch": torch.__version__, "trl": trl.__version__},
    }  # fmt: skip
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
