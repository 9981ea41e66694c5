"""Rate, norm of the gradient, tokens: of every method, under accumulation, and counted on in a resumed run."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, Trainer
from support.runs import METHODS, build, one_step, write_rows
from support.tiny import tiny_folder

from lit_align import DPOModule, Network, PreferenceDataModule, Source

EVERY = {"train/learning_rate", "train/grad_norm", "train/tokens", "train/tokens_scored"}
OF_PAIRS = {"chosen_reward", "rejected_reward", "margin", "chosen_logp", "rejected_logp"}
OWN = {
    "sft": {"train/token_accuracy", "val/token_accuracy"},
    "reward": {"train/accuracy", "train/margin", "train/score_mean", "val/margin"},
    "dpo": {"train/accuracy", *(f"{stage}/{name}" for stage in ("train", "val") for name in OF_PAIRS)},
    "dpo_cached": set(),
    "ppo": {"ppo/length_max", "ppo/cut", "ppo/groups_without_variance", "ppo/entropy", "ppo/grad_norm"},
    "ppo_separate_value": set(),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tracking")
    write_rows(root)
    tiny_folder(root / "policy")
    tiny_folder(root / "reference", seed=1)
    return root


def step(place: Path, method: str, **options: Any) -> dict[str, float]:
    return one_step(method, str(place / "policy"), place, **options)[2]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_says_what_people_look_for(method: str, place: Path) -> None:
    metrics = step(place, method, held_out=3)
    assert metrics.keys() >= EVERY | OWN[method]
    assert metrics["train/learning_rate"] == 1.0
    assert metrics["train/grad_norm"] > 0
    assert 0 < metrics["train/tokens_scored"] < metrics["train/tokens"]


# Kills: counts of the last micro-batch alone; padding counted; a norm after clipping, or of sums and not of means.
@pytest.mark.parametrize("method", ["sft", "reward", "dpo"])
def test_however_the_work_is_cut_up(method: str, place: Path) -> None:
    whole = step(place, method, batch_size=8)
    cut = {
        "accumulated": step(place, method, batch_size=2, accumulate=4),
        "micro-batches": step(place, method, batch_size=8, micro_batch_tokens=120),
        "clipped": step(place, method, batch_size=8, clip=1e-3),
    }
    for name, metrics in cut.items():
        kept = {key: value for key, value in whole.items() if key.startswith("train/")}
        assert {key: metrics[key] for key in kept} == pytest.approx(kept, rel=1e-6), name


def test_tokens_are_those_of_the_rows(place: Path) -> None:
    _, data = build("sft", str(place / "policy"), place, batch_size=8)
    data.setup("fit")
    items = data.training_items(8)
    metrics = step(place, "sft", batch_size=8)
    assert metrics["train/tokens"] == sum(item.example.num_tokens for item in items)
    assert metrics["train/tokens_scored"] == sum(sum(item.example.trunk.scored) for item in items)


def test_the_norm_is_that_of_the_gradient(place: Path) -> None:
    """SGD at rate 1: the change of the weights is the gradient."""
    _, weights, metrics = one_step("sft", str(place / "policy"), place, batch_size=8)
    module, _ = build("sft", str(place / "policy"), place)
    module.configure_model()
    before = dict(module.named_parameters())
    change = torch.stack([(before[name] - weight).norm() for name, weight in weights.items()]).norm()
    assert metrics["train/grad_norm"] == pytest.approx(change.item(), rel=1e-9)


class Counts(Callback):
    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.seen.append(float(trainer.callback_metrics["train/tokens"]))


def test_a_resumed_run_counts_on(place: Path, tmp_path: Path) -> None:
    def train(steps: int, resume: str | None = None) -> list[float]:
        counts = Counts()
        module, data = build("sft", str(place / "policy"), place, dtype="float32", batch_size=2)
        trainer = Trainer(
            max_steps=steps,
            accelerator="cpu",
            callbacks=[counts],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=0,
        )
        trainer.fit(module, data, ckpt_path=resume, weights_only=resume and True)
        trainer.save_checkpoint(tmp_path / f"{steps}.ckpt")
        return counts.seen

    whole, first = train(4), train(2)
    assert whole == sorted(set(whole))
    assert first + train(4, str(tmp_path / "2.ckpt")) == whole


def test_accuracy_of_tokens_is_that_of_the_logits(place: Path) -> None:
    module: Any
    module, data = build("sft", str(place / "policy"), place, batch_size=8)
    module.configure_model()
    data.setup("fit")
    batch = data.collate(data.training_items(8))
    expected = module.policy.logits(module.policy.hidden(batch)[0]).argmax(-1) == batch.target_S
    for pieces in (False, True):
        if pieces:
            module.policy._plain_head = lambda: False
        assert torch.equal(module.policy(batch, hits=True).hits_S, expected)


def test_groups_that_teach_nothing_are_counted(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert step(place, "ppo_grpo", batch_size=4)["ppo/groups_without_variance"] < 1
    monkeypatch.setattr("support.runs.echo", lambda rows, completions: [1.0] * len(completions))
    metrics = step(place, "ppo_grpo", batch_size=4)
    assert metrics["ppo/groups_without_variance"] == 1.0
    assert metrics["ppo/cut"] == 1 - metrics["ppo/eos"] == 0.5
    assert metrics["ppo/length_max"] >= metrics["ppo/length"]


def test_kto_on_answers_that_were_judged_alone(place: Path) -> None:
    """No pair, and so far no accuracy: it was NaN."""
    rows = [{"prompt": f"say {i}", "completion": "a" * (i + 1), "label": bool(i % 2)} for i in range(6)]
    (place / "judged_alone.json").write_text(json.dumps(rows))
    folder = str(place / "policy")
    source = [Source(str(place / "judged_alone.json"))]
    data = PreferenceDataModule(folder, source, val=source, batch_size=3, keep_ties=True, cache_dir="none")
    module = DPOModule(Network(folder), loss="kto", optimizer=functools.partial(torch.optim.SGD, lr=0.1))
    trainer = Trainer(max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.fit(module, data)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert 0 <= metrics["val/accuracy"] <= 1
    assert metrics["val/accuracy"] == metrics["val/judged_accuracy"]
    for stage in ("train", "val"):
        assert {f"{stage}/desired_reward", f"{stage}/undesired_reward", f"{stage}/judged_accuracy"} <= metrics.keys()
