"""A run that has gone wrong is stopped, and its last good checkpoint is still there."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from lit_align.callbacks import Diverged, DivergenceGuard

pytestmark = [
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
]


class Scripted(LightningModule):
    """Logs numbers from a list, a batch at a time."""

    def __init__(self, **scripts: list[float]) -> None:
        super().__init__()
        self.scripts = scripts
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        for name, script in self.scripts.items():
            self.log(name.replace("_", "/", 1), script[batch_idx])
        return self.weight.sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def run(guard: DivergenceGuard, folder: Path, **scripts: list[float]) -> Trainer:
    batches = len(next(iter(scripts.values())))
    checkpoint = ModelCheckpoint(folder, every_n_train_steps=1, save_last=True)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        callbacks=[guard, checkpoint],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Scripted(**scripts), DataLoader(torch.zeros(batches, 1), batch_size=1))
    return trainer


# Kills: one hint for all.
# Kills: limits compared the wrong way round; the first batch's length not kept; the step or the checkpoint not named.
@pytest.mark.parametrize(
    ("options", "scripts", "says"),
    [
        ({"kl": 5.0}, {"ppo_kl": [1.0, 4.9, 5.1, 1.0]}, "step 3: ppo/kl is 5.1, above 5: raise .*kl_coef"),
        (
            {"entropy": 0.5},
            {"ppo_entropy": [2.0, 0.6, 0.4, 2.0]},
            "step 3: ppo/entropy is 0.4, below 0.5: .*clip_high",
        ),
        (
            {"length": 2.0},
            {"ppo_length": [10.0, 19.0, 21.0, 1.0]},
            "step 3: ppo/length is 21, above 20: set .*eos",
        ),
        ({}, {"train_loss": [1.0, 2.0, torch.nan, 1.0]}, "step 3: train/loss is nan: lower the learning rate"),
        ({}, {"ppo_policy_loss": [1.0, 2.0, torch.inf, 1.0]}, "step 3: ppo/policy_loss is inf"),
        ({"kl": 5.0, "patience": 2}, {"ppo_kl": [6.0, 1.0, 6.0, 7.0, 1.0]}, "step 4: ppo/kl is 7, above 5"),
    ],
)
def test_what_stops_a_run(options: dict[str, Any], scripts: dict, says: str, tmp_path: Path) -> None:
    with pytest.raises(Diverged, match=f"stopped at optimizer {says}.*the last checkpoint before is .*last.ckpt"):
        run(DivergenceGuard(**options), tmp_path, **scripts)
    stopped = int(says[5])
    assert torch.load(tmp_path / "last.ckpt", weights_only=False)["global_step"] == stopped - 1


def test_what_does_not(tmp_path: Path) -> None:
    fine = {"ppo_kl": [1.0, 5.0], "ppo_entropy": [2.0, 0.5], "ppo_length": [10.0, 20.0], "train_loss": [1.0, 9.0]}
    run(DivergenceGuard(kl=5.0, entropy=0.5, length=2.0), tmp_path, **fine)
    run(DivergenceGuard(), tmp_path / "no limits", ppo_kl=[1.0, 1e9], ppo_entropy=[1.0, 0.0], ppo_length=[1.0, 1e9])
    run(DivergenceGuard(kl=5.0, patience=2), tmp_path / "patient", ppo_kl=[6.0, 1.0, 6.0, 1.0])
    with pytest.raises(ValueError, match="patience must be at least 1"):
        DivergenceGuard(patience=0)


def test_it_goes_on_from_where_it_was(tmp_path: Path) -> None:
    guard = DivergenceGuard(length=2.0, patience=3)
    run(guard, tmp_path, ppo_length=[10.0, 30.0, 30.0])
    again = DivergenceGuard(length=2.0, patience=3)
    again.load_state_dict(guard.state_dict())
    with pytest.raises(Diverged, match="step 1: ppo/length is 25, above 20"):
        run(again, tmp_path / "again", ppo_length=[25.0])


def test_a_learning_rate_that_is_far_too_high(fit: Callable, tmp_path: Path) -> None:
    with pytest.raises(Diverged, match="train/loss is nan: lower the learning rate"):
        fit(DivergenceGuard(), model={"optimizer": functools.partial(torch.optim.SGD, lr=1e30)}, max_epochs=9)
