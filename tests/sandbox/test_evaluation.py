"""Policies before gold: best-of-n beside them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from support.tiny import tiny_folder
from torch import Tensor

from lit_align.rewards import Reward
from lit_align.sandbox.evaluation import Evaluate
from lit_align.types import Rollout


class Characters(Reward):
    """The longest text."""

    def forward(self, rollout: Rollout) -> Tensor:
        return torch.tensor([float(len(text)) for text in rollout.texts])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_folder(tmp_path_factory.mktemp("model"))


def test_best_of_n(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lit_align.sandbox.evaluation.calibration", lambda *_: {})
    rewards = {"characters": Characters()}
    told = {"policies": {"sft": folder}, "reference": folder, "prompts": 40, "max_new_tokens": 6}
    figures = Evaluate(**told, rewards=rewards, best_of={"characters": 8}).run(tmp_path)  # type: ignore[arg-type]
    assert figures["best_of_8/kl_bound"] == pytest.approx(math.log(8) - 7 / 8)
    assert "best_of_8/kl" not in figures
    assert {"best_of_8/gold_reward", "best_of_8/content", "best_of_8/harm_refusal"} <= set(figures)
    assert figures["best_of_8/characters_score"] > figures["sft/characters_score"]
    # One answer to each prompt, and that of the prompt.
    lines = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    by_policy = {name: [line["prompt"] for line in lines if line["policy"] == name] for name in ("sft", "best_of_8")}
    assert len(by_policy["sft"]) == 40
    assert by_policy["best_of_8"] == by_policy["sft"]
    # Best of one is the policy.
    figures = Evaluate(**told, rewards=rewards, best_of={"characters": 1}).run(tmp_path)  # type: ignore[arg-type]
    assert figures["best_of_1/gold_reward"] == figures["sft/gold_reward"]
    assert figures["best_of_1/kl_bound"] == 0


def test_best_by_a_reward_that_is_not_there(folder: str) -> None:
    with pytest.raises(ValueError, match="best_of names 'gold', which is none of the rewards: reward"):
        Evaluate({"sft": folder}, folder, {"reward": Characters()}, best_of={"gold": 4})  # type: ignore[dict-item]
