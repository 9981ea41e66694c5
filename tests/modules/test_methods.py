"""SFT, reward and DPO: what is logged and validated, schedules, checkpoints, flags of the Trainer."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from support.runs import write_rows
from support.tiny import tiny_folder

from lit_align import (
    DPOModule,
    InstructionDataModule,
    Lora,
    Network,
    PreferenceDataModule,
    PromptDataModule,
    RewardModule,
    Sampling,
    SFTModule,
    Source,
)
from lit_align.callbacks import RunCheckpoint
from lit_align.modules import WSD, Constant, Cosine, Linear
from lit_align.modules.metrics import hits


@pytest.fixture
def place(tmp_path: Path) -> Path:
    write_rows(tmp_path)
    tiny_folder(tmp_path / "model")
    return tmp_path


def network(place: Path, **options: Any) -> Network:
    return Network(str(place / "model"), **options)


def demos(place: Path, **options: Any) -> InstructionDataModule:
    options = {"val_fraction": 0.25, "batch_size": 2, "cache_dir": "none", **options}
    return InstructionDataModule(str(place / "model"), [Source(str(place / "demos.json"))], **options)


def rankings(place: Path, **options: Any) -> PreferenceDataModule:
    rankings = [Source(str(place / "rankings.json"))]
    options = {"val": None if "val_fraction" in options else rankings, "batch_size": 2, "cache_dir": "none", **options}
    return PreferenceDataModule(str(place / "model"), rankings, **options)


def trainer(**options: Any) -> Trainer:
    options = {"max_epochs": 1, "logger": False, "enable_checkpointing": False, **options}
    return Trainer(accelerator="cpu", enable_progress_bar=False, enable_model_summary=False, **options)


def adam(lr: float = 0.01) -> Any:
    return functools.partial(torch.optim.AdamW, lr=lr, weight_decay=0.0)


def test_each_method_lowers_its_loss(place: Path) -> None:
    pairs: list[tuple[LightningModule, Any]] = [
        (SFTModule(network(place), optimizer=adam()), demos(place, val_fraction=0.0)),
        (RewardModule(network(place), optimizer=adam()), rankings(place, val_fraction=0.0)),
        (RewardModule(network(place), loss="plackett_luce", optimizer=adam()), rankings(place, val_fraction=0.0)),
        (RewardModule(network(place), loss="davidson", optimizer=adam()), rankings(place, val_fraction=0.0)),
        (DPOModule(network(place), optimizer=adam()), rankings(place, val_fraction=0.0)),
        (DPOModule(network(place, lora=Lora(r=4)), optimizer=adam()), rankings(place, val_fraction=0.0)),
        *((DPOModule(network(place), loss=loss, optimizer=adam()), rankings(place)) for loss in ("ipo", "simpo")),
        (DPOModule(network(place), loss="sigmoid_norm", beta=5.0, optimizer=adam()), rankings(place)),
    ]
    for module, data in pairs:
        torch.manual_seed(0)
        run = trainer(max_epochs=6)
        losses: list[float] = []
        module.on_train_batch_end = lambda *_, run=run, losses=losses: losses.append(  # type: ignore[method-assign]
            run.callback_metrics["train/loss"].item()
        )
        run.fit(module, data)
        assert sum(losses[-3:]) < 0.8 * sum(losses[:3]), type(module).__name__


@pytest.mark.parametrize("lora", [None, Lora(r=4)], ids=["full", "lora"])
def test_dpo_starts_at_log_two(place: Path, lora: Lora | None) -> None:
    (metrics,) = trainer().validate(DPOModule(network(place, lora=lora)), rankings(place), verbose=False)
    # Three pairs of weight 1/3, or one of weight 1: log 2 for a prompt however many answers it has.
    assert metrics["val/loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert metrics["val/accuracy"] == 0.5


# Kills: a tie counted as wrong in training, where validation counts it half.
def test_a_tie_is_half_right(place: Path) -> None:
    assert hits(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 1.0, 4.0])).tolist() == [0.5, 1.0, 0.0]
    run = trainer(max_steps=1, limit_val_batches=0)
    run.fit(DPOModule(network(place)), rankings(place))  # at the start policy and reference are one
    assert run.callback_metrics["train/accuracy"] == 0.5


def test_reference_free_losses_load_no_reference(place: Path) -> None:
    module = DPOModule(network(place), loss="simpo")
    module.configure_model()
    assert module.reference is None


def test_validation_loss_is_a_mean_over_tokens_whatever_the_batches(place: Path) -> None:
    losses = []
    for size in (1, 2, 8):
        (metrics,) = trainer().validate(SFTModule(network(place)), demos(place, val_batch_size=size), verbose=False)
        losses.append(metrics["val/loss"])
        assert metrics["val/perplexity"] == pytest.approx(math.exp(metrics["val/loss"]), rel=1e-5)
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-6)


def test_reward_accuracy_counts_pairs_and_brings_the_length_meter(place: Path) -> None:
    for size in (1, 3):
        (metrics,) = trainer().validate(
            RewardModule(network(place)), rankings(place, val_batch_size=size), verbose=False
        )
        assert metrics["val/accuracy_low"] <= metrics["val/accuracy"] <= metrics["val/accuracy_high"]
        assert 0 <= metrics["val/shorter_wins"] <= 1


def test_rewards_are_normalised_on_held_out_answers_and_exported_so(place: Path) -> None:
    module = RewardModule(network(place), optimizer=adam())
    data = rankings(place, val_fraction=0.5)
    trainer(max_epochs=2).fit(module, data)
    rewards = torch.cat([module.scorer.eval().rewards(batch.packed) for batch in data.val_dataloader()])
    assert rewards.mean().item() == pytest.approx(0.0, abs=1e-4)
    assert rewards.std().item() == pytest.approx(1.0, abs=1e-4)
    assert module.exported().config.reward_std == pytest.approx(module.scorer.std.item())
    kept = RewardModule(network(place), normalize=False, optimizer=adam())
    trainer().fit(kept, rankings(place))
    assert (kept.scorer.mean.item(), kept.scorer.std.item()) == (0.0, 1.0)


def test_test_and_predict(place: Path) -> None:
    (metrics,) = trainer().test(SFTModule(network(place)), demos(place), verbose=False)
    assert set(metrics) == {"test/loss", "test/perplexity", "test/token_accuracy"}
    prompts = PromptDataModule(
        str(place / "model"), [Source(str(place / "demos.json"))], val_fraction=0.9, batch_size=3, cache_dir="none"
    )
    sampling = Sampling(5, samples=2)
    rows = [row for batch in trainer().predict(SFTModule(network(place), sampling=sampling), prompts) for row in batch]
    assert len(rows) >= 4
    assert all(len(row["completions"]) == len(row["finished"]) == 2 and row["reference"] for row in rows)
    scores = [row for batch in trainer().predict(RewardModule(network(place)), rankings(place)) for row in batch]
    assert [len(row["rewards"]) for row in scores] == [2, 3] or [len(row["rewards"]) for row in scores]


def test_checkpoints_hold_trained_weights_only(place: Path) -> None:
    keep = ModelCheckpoint(place / "ckpt", save_last=True, every_n_epochs=1)
    module = DPOModule(network(place, lora=Lora(r=4)), reference=network(place), optimizer=adam())
    trainer(callbacks=[keep], enable_checkpointing=True).fit(module, rankings(place))
    saved = torch.load(place / "ckpt" / "last.ckpt", weights_only=True)["state_dict"]
    assert saved
    assert all(".lora_" in name for name in saved)


def test_a_checkpoint_of_another_model_is_refused(place: Path) -> None:
    keep = ModelCheckpoint(place / "ckpt", save_last=True, every_n_epochs=1)
    trainer(callbacks=[keep], enable_checkpointing=True).fit(SFTModule(network(place), optimizer=adam()), demos(place))
    other = SFTModule(network(place, lora=Lora(r=4)), optimizer=adam())
    with pytest.raises(ValueError, match=r"lacks \d+ weights"):
        trainer(max_epochs=2).fit(other, demos(place), ckpt_path=str(place / "ckpt" / "last.ckpt"))


@pytest.mark.parametrize("schedule", [Constant(0.5), Linear(2, floor=0.1), Cosine(0.25), WSD(1, 0.5)])
def test_schedules_stretch_over_the_optimizer_steps_of_the_run(place: Path, schedule: Any) -> None:
    module = SFTModule(network(place), optimizer=adam(1.0), schedule=schedule)
    rates: list[float] = []
    run = trainer(max_epochs=3, accumulate_grad_batches=2, limit_val_batches=0)

    def note(*_: Any) -> None:
        rates.append(run.optimizers[0].param_groups[0]["lr"])

    module.on_train_batch_start = note  # type: ignore[method-assign]
    run.fit(module, demos(place, val_fraction=0.0))
    steps = 3 * 2  # epochs, steps: eight rows in batches of two, two at a time
    assert rates[::2] == pytest.approx([schedule.factor(step, steps) for step in range(steps)])


def test_schedule_factors() -> None:
    assert [Linear(2).factor(s, 6) for s in range(7)] == pytest.approx([1 / 3, 2 / 3, 1.0, 0.75, 0.5, 0.25, 0.0])
    assert Cosine(0.0, floor=0.2).factor(5, 10) == pytest.approx(0.6)
    assert Cosine().factor(99, 10) == 0.0
    assert Constant(4).factor(7, 8) == 1.0
    with pytest.raises(ValueError, match="floor"):
        Linear(floor=2.0)


def test_warmup_stable_decay() -> None:
    def factors(*options: Any, steps: int = 10) -> list[float]:
        return [WSD(*options).factor(step, 10) for step in range(steps)]

    stable = [1 / 3, 2 / 3, *[1.0] * 4]
    assert factors(2, 4, steps=12) == pytest.approx([*stable, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0])
    assert factors(0.2, 0.4) == pytest.approx(factors(2, 4))
    assert factors(2, 4, "linear", 0.2) == pytest.approx([*stable, 1.0, 0.8, 0.6, 0.4])
    half = math.sqrt(0.5)
    cosine = [1.0, 0.5 + 0.5 * half, 0.5, 0.5 - 0.5 * half]
    assert factors(2, 4, "cosine") == pytest.approx([*stable, *cosine])
    # Half of it is left after every T = decay_steps / 2 steps: floor 1 / 4.
    assert factors(2, 4, "exponential", 0.25, steps=12) == pytest.approx(
        [*stable, 1.0, half, 0.5, 0.5 * half, 0.25, 0.25]
    )
    assert factors(0, 0) == [1.0] * 10
    with pytest.raises(ValueError, match="give a floor"):
        WSD(0, 4, "exponential")
    with pytest.raises(ValueError, match="nor exceed 1"):
        WSD(0.6, 0.5)
    with pytest.raises(ValueError, match="8 steps of warm-up and 4 of decay do not fit in 10 optimizer steps"):
        WSD(8, 4).factor(0, 10)


def test_a_schedule_without_an_end_is_refused(place: Path) -> None:
    module = SFTModule(network(place), schedule=Cosine())
    with pytest.raises(ValueError, match=r"max_epochs or trainer\.max_steps"):
        trainer(max_epochs=-1, max_time="00:00:00:01").fit(module, demos(place))


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_clip_val": 1e-9},
        {"precision": "bf16-mixed"},
        {"detect_anomaly": True},
        {"overfit_batches": 1},
        {"fast_dev_run": True},
        {"val_check_interval": 0.5},
    ],
    ids=str,
)
def test_trainer_flags_work(place: Path, options: dict) -> None:
    for module, data in (
        (SFTModule(network(place), optimizer=adam()), demos(place)),
        (RewardModule(network(place), optimizer=adam()), rankings(place)),
        (DPOModule(network(place), optimizer=adam()), rankings(place)),
    ):
        run = trainer(**options)
        run.fit(module, data)
        assert math.isfinite(run.callback_metrics["train/loss"].item())


def test_activation_checkpointing_changes_no_gradient(place: Path) -> None:
    grads = []
    for checkpointing in (False, True):
        module = SFTModule(
            network(place, activation_checkpointing=checkpointing), optimizer=functools.partial(torch.optim.SGD, lr=1.0)
        )
        torch.manual_seed(0)
        trainer(max_steps=1, max_epochs=None, limit_val_batches=0).fit(module, demos(place))
        grads.append({name: p.detach().clone() for name, p in module.named_parameters()})
    assert all(torch.allclose(grads[0][name], grads[1][name], atol=1e-6) for name in grads[0])


def test_the_normalisation_of_rewards_outlives_a_checkpoint(place: Path) -> None:
    module = RewardModule(network(place), optimizer=adam())
    trainer(enable_checkpointing=True, callbacks=[ModelCheckpoint(place / "r", save_last=True)]).fit(
        module, rankings(place)
    )
    again = RewardModule(network(place), optimizer=adam())
    again.configure_model()
    again.load_state_dict(torch.load(place / "r" / "last.ckpt", weights_only=True)["state_dict"], strict=False)
    assert again.exported().config.reward_std == pytest.approx(module.scorer.std.item())
    assert again.exported().config.reward_mean == pytest.approx(module.scorer.mean.item())


def test_the_wrong_kind_of_data_is_named(place: Path) -> None:
    with pytest.raises(ValueError, match="SFTModule trains on the batches of a InstructionDataModule"):
        trainer().fit(SFTModule(network(place), optimizer=adam()), rankings(place))
    with pytest.raises(ValueError, match="SFTModule predicts on the batches of a PromptDataModule"):
        trainer().predict(SFTModule(network(place)), demos(place))


def test_overfitting_on_a_batch_sees_one_batch(place: Path) -> None:
    seen = []
    module = SFTModule(network(place), optimizer=adam())
    step = module.micro_step
    module.micro_step = lambda batch: seen.append(batch.tokens_RN.sum().item()) or step(batch)
    trainer(overfit_batches=1, max_epochs=3).fit(module, demos(place, val_fraction=0.0))
    assert len(seen) == 3
    assert len(set(seen)) == 1


def test_no_checkpoint_in_the_middle_of_an_accumulation(place: Path) -> None:
    saved = []

    class Noting(RunCheckpoint):
        def _write(self, trainer: Trainer, path: str) -> None:
            saved.append(trainer.fit_loop.epoch_loop.batch_progress.current.ready)

    run = trainer(
        accumulate_grad_batches=2, val_check_interval=1, callbacks=[Noting(place / "acc")], enable_checkpointing=True
    )
    run.fit(SFTModule(network(place), optimizer=adam()), demos(place, val=[Source(str(place / "demos.json"))]))
    assert saved
    assert all(count % 2 == 0 for count in saved)
