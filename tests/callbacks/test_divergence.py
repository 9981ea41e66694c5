"""A run that has gone wrong is stopped, and its last good checkpoint is still there."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from support.configs import config
from support.parsers import only
from torch.utils.data import DataLoader

from lit_align.callbacks import Diverged, DivergenceGuard, HFExport, RunCheckpoint, divergence
from lit_align.cli.entry import main

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


class Poison(Callback):
    """Gradients that are not finite in a step.

    Args:
        step: which, from 1.
        value: what they are.
    """

    def __init__(self, step: int, value: float = torch.nan) -> None:
        self.step, self.value = step, value

    def on_after_backward(self, trainer: Trainer, module: LightningModule) -> None:
        """Set them."""
        if trainer.global_step + 1 == self.step:
            for parameter in module.parameters():
                if parameter.grad is not None:
                    parameter.grad.fill_(self.value)


def test_weights_of_the_last_step_are_looked_at(fit: Callable, tmp_path: Path) -> None:
    """The loss before the step is finite, and there is none after it."""
    with pytest.raises(Diverged, match=r"step 1: weights are not finite \(policy\..*there is no checkpoint yet"):
        fit(PoisonWeights(1), DivergenceGuard(), max_steps=1)
    with pytest.raises(Diverged, match="weights are not finite"):
        fit(HFExport(tmp_path / "model"), PoisonWeights(1), max_steps=1)
    assert not (tmp_path / "model").exists()
    fit(DivergenceGuard(finite=False), Poison(1), max_steps=1)


# Kills: a look at the loss alone; a save before the look; a checkpoint of weights alone that goes unseen.
@pytest.mark.parametrize("poison", ["Poison", "PoisonWeights"])
@pytest.mark.parametrize(("own", "weights_only"), [(False, False), (True, False), (True, True)])
def test_the_last_finite_checkpoint_is_kept(
    fit: Callable, tmp_path: Path, own: bool, weights_only: bool, poison: str
) -> None:
    kind = RunCheckpoint if own else ModelCheckpoint
    folder = tmp_path / "checkpoints"
    keep = kind(folder, every_n_train_steps=1, save_last=True, save_weights_only=weights_only)
    with pytest.raises(Diverged, match=r"step 3: (weights are|train/grad_norm is).*before is .*last\.ckpt"):
        fit(globals()[poison](3), DivergenceGuard(), keep, enable_checkpointing=True)
    saved = torch.load(folder / "last.ckpt", weights_only=False)
    assert saved["global_step"] == 2
    assert all(weight.isfinite().all() for weight in saved["state_dict"].values())


class PoisonWeights(Callback):
    """Weights that are not finite after a step.

    Args:
        step: which, from 1.
    """

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *call: Any) -> None:
        """Set them."""
        if trainer.global_step == self.step:
            next(module.parameters()).data.fill_(torch.nan)


class Scaled(MixedPrecision):
    """fp16-mixed's plugin with a scaler, in fp32 on the CPU."""

    def __init__(self) -> None:
        super().__init__("bf16-mixed", "cpu")
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4)


# Kills: gradients of a step that the scaler skips taken for a run that has gone wrong.
def test_a_step_that_the_scaler_skips_is_fine(fit: Callable) -> None:
    class Norm(Callback):
        def on_before_optimizer_step(self, trainer: Trainer, module: LightningModule, optimizer: Any) -> None:
            norm = torch.nn.utils.get_total_norm([p.grad for p in module.parameters() if p.grad is not None])
            module.log("train/grad_norm", norm)

    plugin = Scaled()
    trainer = fit(DivergenceGuard(), Poison(2, torch.inf), Norm(), plugins=[plugin], max_steps=4)
    assert trainer.global_step == 4
    assert plugin.scaler.get_scale() < 2.0**4
    with pytest.raises(Diverged, match="train/grad_norm is inf"):
        fit(DivergenceGuard(), Poison(2, torch.inf), Norm(), max_steps=4)


def test_a_module_that_logs_nothing(tmp_path: Path) -> None:
    class Silent(Scripted):
        def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
            return self.weight.sum() * (torch.nan if batch_idx == 2 else 1.0)

    trainer = Trainer(
        accelerator="cpu", max_epochs=1, logger=False, callbacks=[DivergenceGuard()], enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    with pytest.raises(Diverged, match="step 3: the loss is nan"):
        trainer.fit(Silent(), DataLoader(torch.zeros(4, 1), batch_size=1))


# Kills: no guard from the command line; a guard beside the user's.
@pytest.mark.parametrize("given", [False, True])
def test_from_the_command_line(
    parts: tuple[str, Path], tmp_path: Path, given: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    only("fit", monkeypatch)
    trainer: dict[str, Any] = {"max_steps": 4, "enable_progress_bar": False, "limit_val_batches": 0}
    content = config("sft", *parts, tmp_path / "run", **trainer)
    content["model"]["init_args"]["optimizer"] = {"class_path": "torch.optim.SGD", "init_args": {"lr": 1e38}}
    del content["model"]["init_args"]["schedule"]
    content["data"]["init_args"]["cache_dir"] = "none"
    if given:
        content["trainer"]["callbacks"] = [{"class_path": "lit_align.callbacks.DivergenceGuard"}]
    (tmp_path / "run.yaml").write_text(json.dumps(content))
    with pytest.raises(Diverged, match="stopped at optimizer step"):
        main(["fit", "-c", str(tmp_path / "run.yaml")])
    assert not (tmp_path / "run" / "model").exists()
    assert not list((tmp_path / "run").glob("checkpoints/*"))


# Kills: a wait for the device in every micro-batch.
def test_it_looks_once_an_optimizer_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[int] = []
    monkeypatch.setattr(DivergenceGuard, "_look", lambda self, trainer, outputs: looks.append(trainer.global_step))
    trainer = Trainer(
        accelerator="cpu", max_epochs=1, logger=False, callbacks=[DivergenceGuard()], accumulate_grad_batches=4,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path, enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(Scripted(train_loss=[1.0] * 8), DataLoader(torch.zeros(8, 1), batch_size=1))
    assert [step for step in looks if step] == [1, 2]


# Kills: last.ckpt of the working folder named as the run's.
def test_a_checkpoint_callback_without_a_folder_has_no_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "last.ckpt").touch()
    trainer = Trainer(accelerator="cpu", logger=False, callbacks=[ModelCheckpoint()], enable_progress_bar=False)
    with pytest.raises(Diverged, match="there is no checkpoint yet"):
        divergence._stop(trainer, "a reason")
