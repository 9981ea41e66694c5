"""Lower precision, recomputed activations and fused kernels, for each of the four methods: the same gradient."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from support.runs import Scripted, echo, write_rows
from support.tiny import tiny_folder
from torch import Tensor

from lit_align import (
    DPOModule,
    FunctionReward,
    InstructionDataModule,
    Lora,
    Network,
    PPOModule,
    PreferenceDataModule,
    PromptDataModule,
    RewardModule,
    Sampling,
    SFTModule,
    Source,
)
from lit_align.rollout import TransformersEngine

METHODS = ("sft", "reward", "dpo", "ppo")
SGD = functools.partial(torch.optim.SGD, lr=0.1)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    write_rows(tmp_path)
    # Of ordinary width: bf16 leaves logits of 30 no digit behind the point.
    tiny_folder(tmp_path / "model", initializer_range=0.1)
    tiny_folder(tmp_path / "reference", seed=1, initializer_range=0.1)
    return tmp_path


class Gradients(Callback):
    """Keeps those of the first optimizer step."""

    kept: Tensor | None = None

    def on_before_optimizer_step(self, trainer: Any, pl_module: LightningModule, optimizer: Any) -> None:
        if self.kept is None:
            grads = [p.grad.flatten().double() for p in pl_module.parameters() if p.grad is not None]
            self.kept = torch.cat(grads)


def build(method: str, place: Path, optimizer: Any, **options: Any) -> tuple[LightningModule, LightningDataModule]:
    folder = str(place / "model")
    network, reference = (
        Network(folder, **options),
        Network(str(place / "reference"), dtype=options.get("dtype", "float32")),
    )
    rows: dict[str, Any] = {"val_fraction": 0.0, "cache_dir": "none"}
    demos, rankings = [Source(str(place / "demos.json"))], [Source(str(place / "rankings.json"))]
    if method == "sft":
        return SFTModule(network, optimizer=optimizer), InstructionDataModule(folder, demos, **rows)
    if method == "reward":
        return RewardModule(network, optimizer=optimizer), PreferenceDataModule(folder, rankings, **rows)
    if method == "dpo":
        module = DPOModule(network, reference=reference, optimizer=optimizer)
        return module, PreferenceDataModule(folder, rankings, **rows)
    ppo = PPOModule(
        network,
        FunctionReward(echo),
        reference=reference,
        epochs=1,
        sampling=Sampling(6, samples=2),
        engine=Scripted(),
        optimizer=optimizer,
        max_grad_norm=None,
    )
    return ppo, PromptDataModule(folder, demos, **rows)


def fit(module: LightningModule, data: LightningDataModule, **options: Any) -> tuple[Tensor, Tensor]:
    """Gradients of the first step, and the weights after it."""
    gradients = Gradients()
    torch.manual_seed(0)
    trainer = Trainer(
        max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, limit_val_batches=0, callbacks=[gradients], **options,
    )  # fmt: skip
    trainer.fit(module, data)
    assert all(math.isfinite(value) for value in trainer.callback_metrics.values())
    assert gradients.kept is not None
    weights = torch.cat([p.detach().flatten().double() for p in module.parameters() if p.requires_grad])
    assert weights.isfinite().all()
    return gradients.kept, weights


def alike(one: Tensor, other: Tensor) -> float:
    """Cosine of two gradients."""
    return float(torch.nn.functional.cosine_similarity(one, other, dim=0))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("how", ["mixed", "bf16 weights"])
def test_bf16_has_the_gradient_of_fp32(method: str, how: str, place: Path) -> None:
    network = {"dtype": "bfloat16"} if how == "bf16 weights" else {}
    trainer = {"precision": "bf16-mixed"} if how == "mixed" else {}
    exact, _ = fit(*build(method, place, SGD))
    lower, _ = fit(*build(method, place, SGD, **network), **trainer)
    assert alike(exact, lower) > 0.98
    assert lower.norm() / exact.norm() == pytest.approx(1.0, abs=0.1)
    assert not torch.equal(exact, lower)


@pytest.mark.parametrize("lora", [None, Lora(r=2)], ids=["full", "lora"])
@pytest.mark.parametrize("method", METHODS)
def test_recomputed_activations_have_the_same_gradient(method: str, lora: Lora | None, place: Path) -> None:
    kept, _ = fit(*build(method, place, SGD, lora=lora))
    recomputed, _ = fit(*build(method, place, SGD, lora=lora, activation_checkpointing=True))
    assert kept.norm() > 0
    assert torch.allclose(kept, recomputed, atol=1e-6 * kept.abs().max().item())


@pytest.mark.parametrize("method", METHODS)
def test_fused_adam_takes_the_same_step(method: str, place: Path) -> None:
    loose, fused = (
        functools.partial(torch.optim.AdamW, lr=1e-3, eps=1e-4, weight_decay=0.1, fused=fused)
        for fused in (False, True)
    )
    _, expected = fit(*build(method, place, loose))
    _, weights = fit(*build(method, place, fused))
    assert torch.allclose(weights, expected, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_all_of_it_together(method: str, place: Path) -> None:
    fused = functools.partial(torch.optim.AdamW, lr=1e-3, fused=True)
    exact, _ = fit(*build(method, place, SGD))
    module, data = build(method, place, fused, activation_checkpointing=True)
    options = {} if method == "ppo" else {"gradient_clip_val": 1.0}
    together, _ = fit(module, data, precision="bf16-mixed", **options)
    assert alike(exact, together) > 0.98


@pytest.mark.parametrize("network", [{"dtype": "bfloat16"}, {"activation_checkpointing": True}], ids=str)
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_ppo_samples_in_lower_precision_what_it_trains_on(network: dict, precision: str, place: Path) -> None:
    module, data = build("ppo", place, SGD, **network)
    module.engine = TransformersEngine()
    drift: dict[str, float] = {}
    module.log_all = lambda prefix, values, **_: drift.update({k: float(v) for k, v in values.items()})  # type: ignore
    fit(module, data, precision=precision)
    # Of bf16 two or three digits are left of each logit, and rows of another shape round otherwise.
    assert drift["drift_ratio"] == pytest.approx(1.0, abs=0.05)
    assert drift["drift_outside"] < 0.1


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_compiled_it_has_the_same_gradient(method: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The graphs of forward and backward without the C++ that is made of them, which takes minutes.
    compiled = functools.partial(torch.compile, backend="aot_eager")
    monkeypatch.setattr(torch, "compile", compiled)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    plain, _ = fit(*build(method, place, SGD))
    whole, _ = fit(*build(method, place, SGD, compile=True))
    assert torch.allclose(plain, whole, atol=1e-5 * plain.abs().max().item())
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1
    assert not torch._dynamo.utils.counters["graph_break"]
