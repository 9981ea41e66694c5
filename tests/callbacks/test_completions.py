"""Answers after each validation: the same prompts and the same draws, in the run's folder and in W&B."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from support.runs import write_rows
from support.tiny import tiny_folder

from lit_align import Network, PreferenceDataModule, RewardModule, SFTModule, Source
from lit_align.callbacks import CompletionsTable, WeightEMA

PROMPTS = ["say a bee", "say sea"]


class Tables(DummyLogger):
    """A logger that takes tables, as W&B's does."""

    def __init__(self) -> None:
        super().__init__()
        self.taken: list[tuple[str, list[str], list[list[Any]], int]] = []

    def log_table(self, key: str, columns: list[str], data: list[list[Any]], step: int) -> None:
        self.taken.append((key, columns, data, step))


def said(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "said.jsonl").read_text().splitlines()]


def test_answers_after_each_validation(fit: Callable[..., Trainer], tmp_path: Path) -> None:
    tables = Tables()
    data = {"val_fraction": 0.3}
    callback = CompletionsTable(PROMPTS)
    trainer = fit(
        callback, data=data, val_check_interval=0.5, num_sanity_val_steps=1, logger=tables, log_every_n_steps=1
    )
    lines = said(tmp_path)
    # Not of the sanity check; at the steps that metrics are written at.
    steps = list(range(trainer.global_step))
    assert [(line["step"], line["prompt"]) for line in lines] == [(n, p) for n in steps for p in PROMPTS]
    assert all(set(line) == {"step", "prompt", "answer", "finished"} for line in lines)
    # The loggers hear the same.
    assert [step for *_, step in tables.taken] == steps
    key, columns, rows, _ = tables.taken[-1]
    assert (key, columns) == ("val/completions", ["step", "prompt", "answer", "finished"])
    assert rows == [list(line.values()) for line in lines[-2:]]


def test_the_average_answers(fit: Callable[..., Trainer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, torch.Tensor]] = []
    answer = SFTModule.answer

    def look(self: SFTModule, *args: Any) -> Any:
        asked.append({name: p.detach().clone() for name, p in self.named_parameters()})
        return answer(self, *args)

    monkeypatch.setattr(SFTModule, "answer", look)
    ema, model = WeightEMA(0.9), {"optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.5)}
    trainer = fit(ema, CompletionsTable(PROMPTS), data={"val_fraction": 0.3}, num_sanity_val_steps=0, model=model)
    weights = dict(trainer.lightning_module.named_parameters())
    assert all(torch.equal(asked[-1][name], average) for name, average in ema.average.items())
    assert any(not torch.equal(asked[-1][name], weight) for name, weight in weights.items())


def test_it_changes_nothing(fit: Callable[..., Trainer]) -> None:
    ends = []
    for callbacks in ([CompletionsTable(PROMPTS)], []):
        torch.manual_seed(0)
        weights = fit(*callbacks, data={"val_fraction": 0.3}, val_check_interval=0.5).lightning_module.state_dict()
        ends.append((weights, torch.get_rng_state()))
    assert all(torch.equal(ends[0][0][key], ends[1][0][key]) for key in ends[1][0])
    # Nor what is drawn next, in a model with dropout.
    assert torch.equal(ends[0][1], ends[1][1])


def test_the_same_draws_every_time(fit: Callable[..., Trainer], tmp_path: Path) -> None:
    answers = []
    for seed in (0, 0, 1):
        fit(CompletionsTable(PROMPTS, seed), data={"val_fraction": 0.3})
        answers.append([line["answer"] for line in said(tmp_path)])
    assert answers[0] == answers[1] != answers[2]


def test_an_interrupted_run_says_it_once(tmp_path: Path) -> None:
    table = CompletionsTable(PROMPTS)
    for step in (1, 2, 3, 2):
        table._write(tmp_path / "said.jsonl", [{"step": step, "answer": f"at {step}"}] * 2)
    assert [line["step"] for line in said(tmp_path)] == [1, 1, 2, 2]


def test_what_cannot_answer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="prompts must not be empty"):
        CompletionsTable([])
    write_rows(tmp_path)
    model = tiny_folder(tmp_path / "model")
    data = PreferenceDataModule(model, [Source(str(tmp_path / "rankings.json"))], val_fraction=0.0, cache_dir="none")
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        callbacks=[CompletionsTable(PROMPTS)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    with pytest.raises(ValueError, match="CompletionsTable: RewardModule answers no prompts"):
        trainer.fit(RewardModule(Network(model)), data)
