"""What the model says to a few prompts, after each validation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lit_align.callbacks.ema import averaged
from lit_align.callbacks.metrics_csv import step_of_loggers
from lit_align.data.chat import ChatEncoder
from lit_align.modules.strategy import check_strategy
from lit_align.types import PromptBatch
from lit_align.utils.disk import write_whole
from lit_align.utils.display import printable

FILE = "said.jsonl"


class CompletionsTable(Callback):
    """Samples answers to `prompts`; to `said.jsonl` in the run's folder, and as a table where a logger takes them.

    With the module's own `sampling`, and with the same seed every time: what changes is the model. Where a `WeightEMA`
    averages the weights, it is the average that answers.

    Args:
        prompts: what a user says.
        seed: of the sampling.
    """

    def __init__(self, prompts: list[str], seed: int = 0) -> None:
        if not prompts:
            raise ValueError("prompts must not be empty: name what the model is asked after each validation")
        self.prompts = prompts
        self.seed = seed

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Look at the module.

        Raises:
            ValueError: it does not answer.
        """
        if not hasattr(pl_module, "answer"):
            raise ValueError(f"CompletionsTable: {type(pl_module).__name__} answers no prompts; take it out")
        check_strategy(trainer.strategy, type(self).__name__, samples=True)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ask, on every process, and write on the first."""
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        module: Any = pl_module
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        encoder = ChatEncoder(getattr(data, "tokenizer", None) or module.tokenizer)
        rows: list[dict[str, Any]] = [{"prompt": [{"role": "user", "content": prompt}]} for prompt in self.prompts]
        tokens = [torch.tensor(encoder.prompt(row["prompt"], row.get("tools"))) for row in rows]
        with averaged(trainer, pl_module):
            rollout = module.answer(PromptBatch(tokens, rows), module.sampling, self.seed)
        if not trainer.is_global_zero:
            return
        # The step that Lightning writes beside metrics; global_step counts PPO's several to a batch.
        step = step_of_loggers(trainer)
        asked = [row["prompt"][0]["content"] for row in rollout.rows]
        lines = [
            {
                "step": step,
                "prompt": printable(prompt, True),
                "answer": printable(text, True),
                "finished": completion.finished,
            }
            for prompt, text, completion in zip(asked, rollout.texts, rollout.completions, strict=True)
        ]
        self._write(Path(trainer.default_root_dir) / FILE, lines)
        for logger in trainer.loggers:
            if hasattr(logger, "log_table"):
                logger.log_table("val/completions", list(lines[0]), [list(line.values()) for line in lines], step=step)

    def _write(self, path: Path, lines: list[dict[str, Any]]) -> None:
        """After what earlier steps said: a run that was interrupted says some of it again."""
        written = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        kept = [line for line in written if line["step"] < lines[0]["step"]]
        write_whole(path, "".join(json.dumps(line) + "\n" for line in [*kept, *lines]))
