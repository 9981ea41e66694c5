"""TRL 1.12's PPO, the last there was, timed: `python peer_trl_ppo.py ppo MODEL STEPS key=value ...`; one JSON line.

Runs in an environment of its own (`pip install trl==1.12.0 'transformers<5.20'`). A random model stops nowhere, so
every answer has its full length on both sides. Policy, reference, reward and value are four models, as TRL has them.
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
os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
import torch
import trl
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
from trl.experimental.ppo import PPOConfig, PPOTrainer


class Clock(TrainerCallback):
    """Seconds from the end of the first update to the end of the last."""

    started = ended = 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Note the time."""
        self.ended = time.perf_counter()
        self.started = self.started or self.ended


def main() -> None:
    """Train and print."""
    _, model, steps = sys.argv[1], sys.argv[2], int(sys.argv[3])
    o: dict[str, Any] = {"assets": ".", "batch": 32, "new_tokens": 48, "device": "cpu", "threads": 2}
    for text in sys.argv[4:]:
        key, value = text.split("=", 1)
        if key in o:
            o[key] = value if key in ("assets", "device") else json.loads(value)
    cuda = o["device"] == "cuda"
    if not cuda:
        torch.set_num_threads(o["threads"])
    torch.manual_seed(0)
    assets = Path(o["assets"])
    place, judge = str(assets / model), str(assets / f"{model}-reward")
    tokenizer = AutoTokenizer.from_pretrained(place, padding_side="left")
    rows = [json.loads(line) for line in (assets / "prompts.jsonl").open()][: steps * o["batch"]]
    ids = [
        tokenizer(tokenizer.apply_chat_template(r["prompt"], tokenize=False, add_generation_prompt=True))["input_ids"]
        for r in rows
    ]
    data = Dataset.from_dict({"input_ids": ids})
    config = PPOConfig(
        output_dir="out", per_device_train_batch_size=o["batch"], gradient_accumulation_steps=1, num_mini_batches=1,
        num_ppo_epochs=4, total_episodes=steps * o["batch"], response_length=o["new_tokens"], stop_token="eos",
        local_rollout_forward_batch_size=o["batch"], learning_rate=1e-5, optim="adamw_torch_fused", use_cpu=not cuda,
        bf16=cuda, num_sample_generations=0, save_strategy="no", report_to="none", disable_tqdm=True, seed=0,
    )  # fmt: skip
    clock = Clock()
    trainer = PPOTrainer(
        args=config, processing_class=tokenizer, train_dataset=data, eval_dataset=data.select(range(8)),
        model=AutoModelForCausalLM.from_pretrained(place), ref_model=AutoModelForCausalLM.from_pretrained(place),
        reward_model=AutoModelForSequenceClassification.from_pretrained(judge, num_labels=1),
        value_model=AutoModelForSequenceClassification.from_pretrained(judge, num_labels=1), callbacks=[clock],
    )  # fmt: skip
    trainer.train()
    seconds = clock.ended - clock.started
    figures = {
        "side": "trl", "method": "ppo", "model": model, "seconds": round(seconds, 3),
        "examples_per_s": (steps - 1) * o["batch"] / seconds,
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "peak_gpu_mb": torch.cuda.max_memory_allocated() >> 20 if cuda else 0,
        "versions": {"torch": torch.__version__, "trl": trl.__version__},
    }  # fmt: skip
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
