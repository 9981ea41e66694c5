"""What every method that trains on its own answers reports of its reward."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning import Trainer
from support.runs import build, echo, write_rows
from support.tiny import tiny_folder

from lit_align import EnsembleReward, FunctionReward, SumReward


def long(rows: list[dict], completions: list[str]) -> list[float]:
    return [float(len(text)) for text in completions]


# Kills: parts not logged; parts after their weights; parts of another rollout.
def test_the_parts_of_a_reward_are_logged(tmp_path: Path) -> None:
    write_rows(tmp_path)
    folder = tiny_folder(tmp_path / "llama" / "policy")
    tiny_folder(tmp_path / "llama" / "reference", seed=1)
    module, data = build("ppo_remax", folder, tmp_path, batch_size=8, val_batch_size=8)
    members = EnsembleReward([FunctionReward(long), FunctionReward(long)], names=["one", "other"])
    module.reward = SumReward([FunctionReward(echo), FunctionReward(long), members], [1.0, 0.1, 0.0])
    seen: list[dict[str, float]] = []
    score = module.shaped_scores

    def noted(rollout: object) -> object:
        scores = score(rollout)
        seen.append({name: part.mean().item() for name, part in module.reward.parts().items()})
        return scores

    module.shaped_scores = noted  # type: ignore[method-assign]
    trainer = Trainer(
        max_steps=1, accelerator="cpu", precision="64-true", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
    )  # fmt: skip
    torch.manual_seed(0)
    trainer.fit(module, data)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    (parts,) = seen
    assert set(parts) == {"echo", "long", "EnsembleReward"} | {
        f"EnsembleReward_{name}" for name in ("one", "other", "deviation")
    }
    for name, value in parts.items():
        assert metrics[f"ppo/reward_{name}"] == pytest.approx(value)
    assert metrics["ppo/reward"] == pytest.approx(parts["echo"] + 0.1 * parts["long"])
    assert parts["EnsembleReward_deviation"] == 0.0
