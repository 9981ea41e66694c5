"""RewardModule on more than ranks: shares of several people, and grades."""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer
from support.runs import write_rows
from support.tiny import tiny_folder

from lit_align import Network, PreferenceDataModule, RewardModule, Source


@pytest.fixture
def place(tmp_path: Path) -> Path:
    write_rows(tmp_path)
    tiny_folder(tmp_path / "model")
    return tmp_path


def judged(place: Path, name: str = "judged.json", format: str = "auto", **options: Any) -> PreferenceDataModule:
    source = [Source(str(place / name), format=format)]
    options = {"val": source, "batch_size": 2, "keep_ties": True, "cache_dir": "none", **options}
    return PreferenceDataModule(str(place / "model"), source, **options)


def module(place: Path, **options: Any) -> RewardModule:
    optimizer = functools.partial(torch.optim.AdamW, lr=0.01, weight_decay=0.0)
    return RewardModule(Network(str(place / "model")), optimizer=optimizer, **options)


def trainer(**options: Any) -> Trainer:
    options = {"max_epochs": 1, "logger": False, "enable_checkpointing": False, **options}
    return Trainer(accelerator="cpu", enable_progress_bar=False, enable_model_summary=False, **options)


@pytest.mark.parametrize("loss", ["bradley_terry", "regression", "davidson", "plackett_luce"])
def test_each_lowers_its_loss(place: Path, loss: Any) -> None:
    torch.manual_seed(0)
    reward, data = module(place, loss=loss), judged(place)
    (before,) = trainer().validate(reward, data, verbose=False)
    trainer(max_epochs=8).fit(reward, data)
    (after,) = trainer().validate(reward, data, verbose=False)
    assert after["val/loss"] < 0.8 * before["val/loss"]


def test_regression_keeps_the_scale_of_its_grades(place: Path) -> None:
    assert not module(place, loss="regression").normalize
    assert module(place, loss="regression", normalize=True).normalize
    assert module(place).normalize
    assert not module(place, normalize=False).normalize


# Kills: a mean over answers and not over prompts; correlation with ranks; correlation of a batch.
def test_regression_is_measured_by_its_error_and_its_correlation(place: Path) -> None:
    reward = module(place, loss="regression")
    seen = []
    for size in (1, 3, 8):
        data = judged(place, val_batch_size=size)
        (metrics,) = trainer().validate(reward, data, verbose=False)
        seen.append((metrics["val/loss"], metrics["val/correlation"]))
    (batch,) = data.val_dataloader()
    with torch.no_grad():
        score_Q = reward.scorer.eval()(batch.packed)
    by_prompt = [
        (score_Q - batch.grade_Q).square()[batch.packed.example_Q == e].mean() for e in range(batch.packed.num_examples)
    ]
    correlation = torch.corrcoef(torch.stack([score_Q, batch.grade_Q]))[0, 1]
    for loss, measured in seen:
        assert loss == pytest.approx(torch.stack(by_prompt).mean().item(), rel=1e-5)
        assert measured == pytest.approx(correlation.item(), abs=1e-5)


def test_regression_needs_a_grade_for_every_answer(place: Path) -> None:
    with pytest.raises(ValueError, match=r"5 of 5 answers in a batch have no grade to learn.*`scores`"):
        trainer().fit(module(place, loss="regression"), judged(place, "rankings.json"))
    rows = json.loads((place / "judged.json").read_text())
    del rows[1]["scores"]
    (place / "some.json").write_text(json.dumps(rows))
    with pytest.raises(ValueError, match=r"3 of 20 answers in a batch have no grade"):
        trainer().fit(module(place, loss="regression"), judged(place, "some.json", batch_size=8))


# Kills: a mean over no pairs logged.
def test_grades_of_single_answers_are_enough(place: Path) -> None:
    rows = [{"prompt": f"say {n}", "completion": "a" * n, "score": n / 4 - 1} for n in range(1, 9)]
    (place / "grades.json").write_text(json.dumps(rows))
    torch.manual_seed(0)
    reward, run = module(place, loss="regression"), trainer(max_epochs=6)
    run.fit(reward, judged(place, "grades.json", "grades"))
    assert "train/accuracy" not in run.callback_metrics
    assert run.callback_metrics["val/correlation"] > 0.5
    assert all(math.isfinite(run.callback_metrics[name]) for name in ("train/loss", "val/loss"))


# Kills: shares not handed on to the loss; people who disagree one to one left out.
def test_a_share_is_what_the_scores_end_at(place: Path) -> None:
    shares = {"a": 0.5, "b": 0.8, "c": 0.3}
    rows = [{"prompt": p, "chosen": f"{p} yes", "rejected": f"{p} no", "share": s} for p, s in shares.items()]
    (place / "shares.json").write_text(json.dumps(rows))
    torch.manual_seed(0)
    reward, data = module(place, normalize=False), judged(place, "shares.json", batch_size=3)
    trainer(max_epochs=60).fit(reward, data)
    (batch,) = data.val_dataloader()
    with torch.no_grad():
        score_EK = reward.scorer.eval()(batch.packed).view(3, 2)
    assert (score_EK[:, 0] - score_EK[:, 1]).sigmoid().tolist() == pytest.approx(list(shares.values()), abs=0.02)
