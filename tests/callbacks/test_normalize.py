"""Rewards of mean 0 and variance 1 on answers of one's choice, also in the folder that is left behind."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning import Trainer
from lightning.pytorch import Callback

from lit_align import InstructionDataModule, Lora, Network, PreferenceDataModule, RewardModule, SFTModule, Source
from lit_align.callbacks import HFExport, NormalizeReward, WeightEMA
from lit_align.data.chat import ChatEncoder
from lit_align.functional.packing import pack
from lit_align.models.load import load_scorer, load_tokenizer
from lit_align.models.scalar import ScalarModel
from lit_align.types import Example, Segment

ANSWERS = [
    {"prompt": "say a", "completions": ["a", "a bee", "a"], "finished": [True, False, True]},
    {"prompt": "say bee", "completions": ["bee!"]},
    {"prompt": "say sea", "completions": ["", "sea sea sea"]},
]


def fitted(parts: tuple[str, Path], out: Path, sources: list[Source], *more: Callback, **network: Any) -> str:
    folder, rows = parts
    rankings = [Source(str(rows / "rankings.json"))]
    data = PreferenceDataModule(folder, rankings, val=rankings, batch_size=4, cache_dir="none")
    optimizer = functools.partial(torch.optim.AdamW, lr=0.01)
    trainer = Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[HFExport(out), NormalizeReward(sources, batch_size=2), *more],
    )  # fmt: skip
    trainer.fit(RewardModule(Network(folder, **network), optimizer=optimizer), data)
    return str(out)


# Kills: normalised before the last step; HFExport before it; answers of a prompt left out; finished ignored; the raw
# weights scored, where the average is exported.
@pytest.mark.parametrize(
    ("network", "more"),
    [({}, []), ({"lora": Lora(r=2)}, []), ({}, [WeightEMA(0.9)])],
    ids=["full", "lora", "averaged"],
)
def test_a_policys_answers_score_0_and_1(
    parts: tuple[str, Path], tmp_path: Path, network: dict[str, Any], more: list[Callback]
) -> None:
    (tmp_path / "answers.json").write_text(json.dumps(ANSWERS))
    out = fitted(parts, tmp_path / "out", [Source(str(tmp_path / "answers.json"), format="answers")], *more, **network)
    model = ScalarModel(load_scorer(Network(out), need_head=True)).eval()
    encoder = ChatEncoder(load_tokenizer(out), template="auto")
    examples = []
    for row in ANSWERS:
        ids = encoder.prompt(row["prompt"])  # type: ignore[arg-type]
        ends = row.get("finished", [True] * len(row["completions"]))
        branches = [encoder.answer(row["prompt"], a, e) for a, e in zip(row["completions"], ends, strict=True)]  # type: ignore[arg-type]
        examples.append(Example(Segment(ids, [False] * len(ids)), branches))
    with torch.no_grad():
        rewards = model.rewards(pack(examples))
    assert rewards.numel() == 6
    assert rewards.mean().item() == pytest.approx(0.0, abs=1e-4)
    assert rewards.std(unbiased=False).item() == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize("name", ["demos.json", "rankings.json"])
def test_demonstrations_and_rankings_serve_too(parts: tuple[str, Path], tmp_path: Path, name: str) -> None:
    config = json.loads(
        (Path(fitted(parts, tmp_path / "out", [Source(str(parts[1] / name))])) / "config.json").read_text()
    )
    assert config["reward_std"] > 0
    assert config["reward_mean"] != 0


def test_a_conversations_last_turn_is_the_answer(parts: tuple[str, Path], tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "say a"}, {"role": "assistant", "content": "a"}]
    told = [
        [{"messages": turns}, {"messages": [*turns, *turns]}],
        [{"prompt": turns[:1], "completion": "a"}, {"prompt": [*turns, *turns[:1]], "completion": "a"}],
    ]
    means = []
    for i, rows in enumerate(told):
        (tmp_path / f"{i}.json").write_text(json.dumps(rows))
        torch.manual_seed(0)
        out = fitted(parts, tmp_path / f"out{i}", [Source(str(tmp_path / f"{i}.json"))])
        means.append(json.loads((Path(out) / "config.json").read_text())["reward_mean"])
    assert means[0] == pytest.approx(means[1])


def test_what_cannot_be_normalised_on_is_said_before_training(parts: tuple[str, Path], tmp_path: Path) -> None:
    (tmp_path / "one.json").write_text(json.dumps(ANSWERS[1:2]))
    with pytest.raises(ValueError, match="needs two answers at least, and its sources hold 1"):
        fitted(parts, tmp_path / "out", [Source(str(tmp_path / "one.json"), format="answers")])
    with pytest.raises(ValueError, match="has no answer: expected demonstrations, rankings, or format: answers"):
        fitted(parts, tmp_path / "out", [Source(str(tmp_path / "one.json"))])
    demos = [Source(str(parts[1] / "demos.json"))]
    trainer = Trainer(max_epochs=1, accelerator="cpu", logger=False, callbacks=[NormalizeReward(demos)])
    with pytest.raises(ValueError, match="not with SFTModule and InstructionDataModule"):
        trainer.fit(SFTModule(Network(parts[0])), InstructionDataModule(parts[0], demos, val_fraction=0.0))


# Kills: found out when training is over.
def test_too_few_prompts_for_the_processes(parts: tuple[str, Path], tmp_path: Path) -> None:
    (tmp_path / "answers.json").write_text(json.dumps(ANSWERS))
    data = PreferenceDataModule(parts[0], [], cache_dir="none")
    trainer: Any = SimpleNamespace(datamodule=data, world_size=4, global_rank=0, state=SimpleNamespace(fn="fit"))
    module = RewardModule(Network(parts[0]))
    with pytest.raises(ValueError, match="3 examples to evaluate are too few for 4 processes"):
        NormalizeReward([Source(str(tmp_path / "answers.json"), format="answers")]).on_fit_start(trainer, module)
