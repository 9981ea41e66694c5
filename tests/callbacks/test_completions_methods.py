"""Every method that generates answers after its validations, and leaves `said.jsonl`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from lightning import Trainer
from support.runs import build, write_rows
from support.tiny import tiny_folder

from lit_align import Source
from lit_align.callbacks import CompletionsTable


@pytest.mark.parametrize("method", ["sft", "dpo", "ppo", "ppo_grpo"])
def test_answers_of_every_method_that_generates(method: str, tmp_path: Path) -> None:
    write_rows(tmp_path)
    tiny_folder(tmp_path / "policy")
    tiny_folder(tmp_path / "reference", seed=1)
    rows = [Source(str(tmp_path / ("rankings.json" if method == "dpo" else "demos.json")))]
    module, data = build(method, str(tmp_path / "policy"), tmp_path, dtype="float32", batch_size=4, val=rows)
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        callbacks=[CompletionsTable(["say a bee"])],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=tmp_path,
    )
    trainer.fit(module, data)
    lines = [json.loads(line) for line in (tmp_path / "said.jsonl").read_text().splitlines()]
    assert {line["prompt"] for line in lines} == {"say a bee"}
