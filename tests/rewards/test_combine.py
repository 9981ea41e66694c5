"""Several rewards as one. A mutant that a test was seen to kill is named above it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser
from support.rollouts import rollout
from support.tiny import tiny_folder
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from lit_align import EnsembleReward, FunctionReward, LengthReward, ModelReward, Network, Reward, SumReward
from lit_align.models.scratch import bpe_tokenizer
from lit_align.types import Completion, Rollout


def said(*texts: str) -> Rollout:
    rows: list[dict[str, Any]] = [{"prompt": f"{text}?"} for text in texts]
    return Rollout([torch.tensor([0])] * len(texts), rows, [Completion([0], True)] * len(texts), list(texts), 1)


def double(rows: list[dict], completions: list[str]) -> list[float]:
    return [2.0] * len(completions)


def length(rows: list[dict], completions: list[str]) -> list[float]:
    return [float(len(text)) for text in completions]


class Loads(Reward):
    tokenizer: Any = None

    def load(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def forward(self, rollout: Rollout) -> Tensor:
        return torch.full((rollout.num_sequences,), 10.0)


# Kills: weights dropped; a reward not loaded; one reward only.
def test_sum() -> None:
    loads = Loads()
    reward = SumReward([FunctionReward(length), FunctionReward(double), loads], [1.0, -0.5, 0.1])
    reward.load("tokenizer")  # type: ignore[arg-type]
    assert loads.tokenizer == "tokenizer"
    assert reward(said("a", "bcd")).tolist() == [1.0, 3.0]
    assert SumReward([FunctionReward(length), FunctionReward(double)])(said("a", "bcd")).tolist() == [3.0, 5.0]
    with pytest.raises(ValueError, match="2 rewards and 1 weights"):
        SumReward([loads, loads], [1.0])
    with pytest.raises(ValueError, match="0 rewards"):
        SumReward([])


# Kills: parts after their weights; one name for two rewards; parts of parts left out.
def test_parts_are_told_before_their_weights_and_by_name() -> None:
    inner = EnsembleReward([FunctionReward(length), FunctionReward(double)], "minimum")
    reward = SumReward([FunctionReward(length), Loads(), Loads(), inner], [2.0, 1.0, 1.0, 0.0])
    assert reward.parts() == {}
    reward(said("a", "bcde"))
    assert {name: part.tolist() for name, part in reward.parts().items()} == {
        "length": [1.0, 4.0],
        "Loads_1": [10.0, 10.0],
        "Loads_2": [10.0, 10.0],
        "EnsembleReward": [1.0, 2.0],
        "EnsembleReward_length": [1.0, 4.0],
        "EnsembleReward_double": [2.0, 2.0],
        "EnsembleReward_deviation": [0.5, 1.0],
    }
    named = SumReward([Loads(), Loads()], names=["right", "form"])
    named(said("a"))
    assert set(named.parts()) == {"right", "form"}
    for names in (["right"], ["right", "right"]):
        with pytest.raises(ValueError, match="2 rewards and the names right"):
            SumReward([Loads(), Loads()], names=names)


# Kills: rules exchanged; coef dropped.
@pytest.mark.parametrize(
    ("combine", "expected"), [("mean", [1.5, 3.0]), ("minimum", [1.0, 2.0]), ("uncertainty", [1.375, 2.5])]
)
def test_an_ensemble(combine: Any, expected: list[float]) -> None:
    # Variances 1/4 and 1.
    reward = EnsembleReward([FunctionReward(length), FunctionReward(double)], combine, coef=0.5)
    assert reward(said("a", "bcde")).tolist() == pytest.approx(expected)


def test_what_is_no_ensemble() -> None:
    with pytest.raises(ValueError, match="at least two rewards"):
        EnsembleReward([Loads()])
    with pytest.raises(ValueError, match="unknown combine 'median': choose mean, minimum or uncertainty"):
        EnsembleReward([Loads(), Loads()], "median")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"must not be negative, got -0\.1"):
        EnsembleReward([Loads(), Loads()], coef=-0.1)


def test_a_part_that_is_no_number_is_named() -> None:
    def broken(rows: list[dict], completions: list[str]) -> list[float]:
        return [math.nan if text == "b" else 1.0 for text in completions]

    reward = SumReward([FunctionReward(double), FunctionReward(broken)])
    with pytest.raises(ValueError, match=r"the reward function broken returned nan for 1 of 2 .* the prompts: 'b\?'"):
        reward(said("a", "b"))


def test_an_ensemble_of_folders_by_class_path(tmp_path: Path) -> None:
    folders = []
    for seed in (1, 2, 3):
        base = tiny_folder(tmp_path / f"base{seed}", seed=seed)
        model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype=torch.float32)
        torch.manual_seed(seed)
        torch.nn.init.normal_(model.score.weight)
        model.save_pretrained(tmp_path / f"{seed}")
        bpe_tokenizer([], 263).save_pretrained(tmp_path / f"{seed}")
        folders.append(str(tmp_path / f"{seed}"))
    members = [{"class_path": "lit_align.ModelReward", "init_args": {"network": {"name": name}}} for name in folders]
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--reward", type=Reward)
    options = {"rewards": members, "combine": "minimum"}
    told = {"reward": {"class_path": "lit_align.EnsembleReward", "init_args": options}}
    reward = parser.instantiate(parser.parse_object(told)).reward
    tokenizer = AutoTokenizer.from_pretrained(folders[0])
    reward.load(tokenizer)
    answers = rollout(tokenizer, [("a?", "bee", True), ("b?", "sea dee", False)])
    each = []
    for name in folders:
        member = ModelReward(Network(name))
        member.load(tokenizer)
        each.append(member(answers))
    assert torch.equal(reward(answers), torch.stack(each).amin(0))
    assert set(reward.parts()) == {"ModelReward_1", "ModelReward_2", "ModelReward_3", "deviation"}
    assert not any(parameter.requires_grad for parameter in reward.parameters())


def test_a_sum_of_anything_else_is_ones_own() -> None:
    class Product(SumReward):
        def combine(self, score_MQ: Tensor) -> Tensor:
            return score_MQ.prod(0)

    assert Product([FunctionReward(length), LengthReward(1, unit="words")])(said("abc")).tolist() == [3.0]
