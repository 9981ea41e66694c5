"""A resumed run with adapters is the run that was not interrupted, whatever the options of the adapters."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer
from support.runs import write_rows
from support.tiny import tiny_folder

from lit_align import DPOModule, InstructionDataModule, Lora, Network, PreferenceDataModule, SFTModule, Source
from lit_align.models import export

OPTIONS: dict[str, dict[str, Any]] = {
    "rslora": {"rslora": True, "init": "gaussian"},
    "dora": {"dora": True},
    "whole": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "embeddings": {"targets": ["all-linear", "embed_tokens", "lm_head"], "init": "default"},
}


def run(
    place: Path, network: Network, steps: int, before: Path | None = None, dpo: bool = False
) -> tuple[Any, Trainer]:
    torch.manual_seed(0)
    data: Any = PreferenceDataModule if dpo else InstructionDataModule
    sources = [Source(str(place / ("rankings.json" if dpo else "demos.json")))]
    options = {"val_fraction": 0.0, "batch_size": 2, "cache_dir": "none"}
    method: Any = DPOModule if dpo else SFTModule
    module = method(network, optimizer=functools.partial(torch.optim.AdamW, lr=0.01))
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, max_steps=steps,
        enable_checkpointing=False, limit_val_batches=0,
    )  # fmt: skip
    trainer.fit(module, data(str(place / "model"), sources, **options), ckpt_path=before, weights_only=before and True)
    return module, trainer


# Kills: a checkpoint without what is trained whole, or without DoRA's lengths.
@pytest.mark.parametrize("dpo", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("option", OPTIONS)
def test_a_resumed_run_is_the_run(option: str, tied: bool, dpo: bool, tmp_path: Path) -> None:
    write_rows(tmp_path)
    folder = tiny_folder(tmp_path / "model", tie_word_embeddings=tied)
    network = Network(folder, lora=Lora(r=2, **OPTIONS[option]))
    whole, _ = run(tmp_path, network, 4, dpo=dpo)
    half, trainer = run(tmp_path, network, 2, dpo=dpo)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed, _ = run(tmp_path, network, 4, tmp_path / "half.ckpt", dpo=dpo)
    expected, got, before = whole.state_dict(), resumed.state_dict(), half.state_dict()
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    assert any(not torch.equal(got[name], before[name]) for name in expected)


# Kills: a resumed run that starts from the adapter again, or whose reference is the model before it.
@pytest.mark.parametrize("folded", [False, True])
def test_a_run_that_starts_from_an_adapter_is_resumed(folded: bool, tmp_path: Path) -> None:
    write_rows(tmp_path)
    folder = tiny_folder(tmp_path / "model")
    first, _ = run(tmp_path, Network(folder, lora=Lora(r=2)), 3)
    adapter = str(export(first.policy.hf, None, tmp_path / "run" / "model", adapter=True).parent)
    network = (
        Network(folder, adapter=adapter, lora=Lora(r=2)) if folded else Network(folder, lora=Lora(adapter=adapter))
    )
    whole, trainer = run(tmp_path, network, 4, dpo=True)
    _, trainer = run(tmp_path, network, 2, dpo=True)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed, _ = run(tmp_path, network, 4, tmp_path / "half.ckpt", dpo=True)
    expected, got = whole.state_dict(), resumed.state_dict()
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    assert (whole.reference is None) is folded
