"""Steps of AdamW in fp32, from one checkpoint to the next, which the Trainer saves when the fit is over.

Run as a program this file is one of the processes.
"""

from __future__ import annotations

import functools
import os
import sys
from pathlib import Path

import torch
from lightning import Trainer

from support.runs import build


def go_on(
    rows: str,
    strategy: str,
    devices: int,
    steps: int,
    before: str | None,
    after: str,
    micro_batch_tokens: int | None = None,
) -> list[int]:
    """Train on batches of four for a number of optimizer steps in all; returns the micro-batches of each batch."""
    torch.manual_seed(0)
    options = {"batch_size": 4 // devices, "micro_batch_tokens": micro_batch_tokens}
    module, data = build("sft", f"{rows}/policy", Path(rows), dtype="float32", **options)
    module.optimizer = functools.partial(torch.optim.AdamW, lr=0.01)
    trainer = Trainer(
        max_steps=steps,
        accelerator="cpu",
        devices=devices,
        strategy=strategy,
        gradient_clip_val=0.5,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, data, ckpt_path=before, weights_only=before and True)
    trainer.save_checkpoint(after)
    return [len(batch) if isinstance(batch, list) else 1 for batch in data.train_dataloader()]


if __name__ == "__main__":
    rows, strategy, steps, before, after, *tokens = sys.argv[1:]
    processes = int(os.environ["WORLD_SIZE"])
    go_on(rows, strategy, processes, int(steps), before or None, after, *map(int, tokens))
