"""On a language small enough to enumerate the best policy is known, pi* ~ pi_ref exp(r / beta). The methods find it."""

from __future__ import annotations

import functools
import itertools
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from lightning import LightningDataModule, LightningModule, Trainer
from support.tiny import tiny_folder
from torch import Tensor

from lit_align import DPOModule, Network, PPOModule, Reward, RewardModule, Sampling
from lit_align.data.loader import Loader
from lit_align.functional.packing import pack
from lit_align.modules import Cosine
from lit_align.modules.ppo import Advantage
from lit_align.types import Example, PackedBatch, PreferenceBatch, PromptBatch, Rollout, Segment

LETTERS = 3
ANSWERS = list(itertools.product(range(LETTERS), repeat=2))  # all nine of two letters each
PROMPT = Segment([1, 2], [False, False])
BETA = 0.5
REWARDS = torch.tensor([((7 * i) % 9) / 4.0 - 1.0 for i in range(9)], dtype=torch.float64)


class Batches(LightningDataModule):
    """Any data module will do that yields the batch type."""

    def __init__(self, batch: Any, count: int) -> None:
        super().__init__()
        self.batch, self.count = batch, count

    def train_dataloader(self) -> Loader:
        return Loader(lambda _: self.batch, self.count)


@pytest.fixture
def folder(tmp_path: Path) -> str:
    # Nearly flat, so that the reference gives every answer a chance to be sampled.
    return tiny_folder(tmp_path / "model", vocab_size=LETTERS, initializer_range=0.1)


def fit(module: LightningModule, data: LightningDataModule) -> None:
    torch.manual_seed(0)
    trainer = Trainer(
        max_epochs=1, accelerator="cpu", precision="64-true", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, data)


def answers_batch() -> PackedBatch:
    return pack([Example(PROMPT, [Segment(list(answer), [True, True]) for answer in ANSWERS])])


def pairs_batch(shares: Tensor, copies: int) -> PreferenceBatch:
    """Every pair of answers `copies` times, the first preferred in the given share of them."""
    examples, ranks = [], []
    for (i, one), (j, other) in itertools.combinations(enumerate(ANSWERS), 2):
        wins = round(copies * shares[i, j].item())
        branches = [Segment(list(answer), [True, True]) for answer in (one, other)]
        examples += [Example(PROMPT, branches)] * copies
        ranks += [[0.0, 1.0]] * wins + [[1.0, 0.0]] * (copies - wins)
    flat = torch.tensor(ranks, dtype=torch.float64).flatten()
    return PreferenceBatch(pack(examples, row_tokens=60), flat, torch.zeros_like(flat))


@torch.no_grad()
def distribution(model: Any) -> Tensor:
    batch = answers_batch()
    return model(batch).sums(batch).exp()


def optimum(reference: Tensor) -> Tensor:
    best = reference * (REWARDS / BETA).exp()
    return best / best.sum()


def total_variation(one: Tensor, other: Tensor) -> float:
    return 0.5 * (one - other).abs().sum().item()


def rate(lr: float) -> Any:
    return functools.partial(torch.optim.Adam, lr=lr)


def test_dpo_finds_the_optimal_policy(folder: str) -> None:
    # Labels in the shares that Bradley-Terry gives them, so that nothing is left to chance.
    batch = pairs_batch(torch.sigmoid(REWARDS[:, None] - REWARDS[None, :]), copies=32)
    module = DPOModule(Network(folder, dtype="float64"), beta=BETA, optimizer=rate(0.01), schedule=Cosine())
    fit(module, Batches(batch, 80))
    before = distribution(module.reference)
    assert total_variation(before, optimum(before)) > 0.2
    assert total_variation(distribution(module.policy), optimum(before)) <= 0.02


class Table(Reward):
    """The reward of each answer."""

    def __init__(self, rewards: Tensor = REWARDS) -> None:
        super().__init__()
        self.rewards = rewards

    def forward(self, rollout: Rollout) -> Tensor:
        return torch.stack([self.rewards[ANSWERS.index(tuple(c.tokens))] for c in rollout.completions]).float()


def ppo(folder: str, reward: Reward, **options: Any) -> PPOModule:
    module = PPOModule(
        Network(folder, dtype="float64"), reward, kl_coef=BETA, lambda_=1.0, epochs=2, micro_batch_size=256,
        sampling=Sampling(max_new_tokens=2, samples=256), max_grad_norm=1.0, optimizer=rate(0.01), schedule=Cosine(),
        **options,
    )  # fmt: skip
    module.stop_ids = list  # type: ignore[method-assign] - every answer has two letters
    fit(module, Batches(PromptBatch([torch.tensor(PROMPT.tokens)], [{"prompt": "?"}]), 80))
    return module


@pytest.mark.parametrize("advantage", get_args(Advantage))
def test_ppo_finds_the_optimal_policy(folder: str, advantage: str) -> None:
    module = ppo(folder, Table(), advantage=advantage)
    before = distribution(module.reference)
    assert total_variation(before, optimum(before)) > 0.2
    assert total_variation(distribution(module.policy), optimum(before)) <= 0.05


# A first letter after which one answer is far better than the others, and two where nothing depends on the second.
UNEVEN = torch.tensor([1.5, -1.0, -1.0, 0.5, 0.5, 0.5, 0.3, 0.3, 0.3], dtype=torch.float64)


def own_price_optimum(reference: Tensor) -> Tensor:
    """Where each letter pays for its own KL alone: the first is chosen for the reward to come, not for its price.

    The second letter is pi_ref exp(r / beta) given the first, and the first pi_ref exp(E r / beta), the mean taken over
    the second as it is chosen; KL in the reward would have log E exp(r / beta) in its place.
    """
    reference_AB, rewards_AB = reference.view(LETTERS, LETTERS), UNEVEN.view(LETTERS, LETTERS)
    prior_A = reference_AB.sum(1)
    second_AB = reference_AB * (rewards_AB / BETA).exp()
    second_AB = second_AB / second_AB.sum(1, keepdim=True)
    first_A = prior_A * ((second_AB * rewards_AB).sum(1) / BETA).exp()
    return (first_A[:, None] / first_A.sum() * second_AB).flatten()


# Kills: k3 for k2 and for k3+; KL in the reward.
@pytest.mark.parametrize("estimator", ["k2", "k3+"])
def test_kl_in_the_loss_has_an_optimum_of_its_own(folder: str, estimator: str) -> None:
    module = ppo(folder, Table(UNEVEN), advantage="rloo", kl_in="loss", kl_estimator=estimator)
    before = distribution(module.reference)
    in_the_reward = before * (UNEVEN / BETA).exp()
    assert total_variation(own_price_optimum(before), in_the_reward / in_the_reward.sum()) > 0.1
    assert total_variation(distribution(module.policy), own_price_optimum(before)) <= 0.05


def test_reward_model_recovers_planted_scores(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "model", vocab_size=LETTERS)
    batch = pairs_batch(torch.sigmoid(REWARDS[:, None] - REWARDS[None, :]), copies=32)
    module = RewardModule(Network(folder, dtype="float64"), optimizer=rate(0.01), schedule=Cosine())
    fit(module, Batches(batch, 80))
    with torch.no_grad():
        scores = module.scorer(answers_batch())
    # Up to a shift: Bradley-Terry sees differences only.
    assert (scores - scores.mean() - REWARDS + REWARDS.mean()).abs().max() < 0.1
