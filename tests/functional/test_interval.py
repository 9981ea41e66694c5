"""Confidence intervals of shares whose observations come in groups.

A mutant that a test was seen to kill is named above it.
"""

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from lit_align.functional.interval import clustered_share


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# Kills: mean of the groups' shares for the ratio of sums; groups / (groups - 1) dropped; residual without counts.
def test_share_and_interval_by_hand() -> None:
    share, low, high = clustered_share(double(3, 1, 2), double(4, 4, 2), z=1.0)
    # Share 6 / 10. Residuals 3 - 2.4, 1 - 2.4, 2 - 1.2 = 0.6, -1.4, 0.8; squares 0.36 + 1.96 + 0.64 = 2.96.
    half = math.sqrt(2.96 * 3 / 2) / 10
    assert_close(torch.stack([share, low, high]), double(0.6, 0.6 - half, 0.6 + half))


# Kills: variance without the factor groups / (groups - 1); z dropped.
def test_groups_of_one_give_the_binomial_interval() -> None:
    hits_E = double(*[1.0] * 30 + [0.0] * 70)
    share, low, high = clustered_share(hits_E, torch.ones_like(hits_E))
    # Residual variance n p (1 - p), unbiased: half = z sqrt(p (1 - p) / (n - 1)).
    half = 1.96 * math.sqrt(0.3 * 0.7 / 99)
    assert_close(torch.stack([share, low, high]), double(0.3, 0.3 - half, 0.3 + half))


def test_repeating_every_observation_of_a_group_does_not_narrow_the_interval() -> None:
    hits_E = double(1, 0, 1, 1, 0, 1, 1, 0)
    once = clustered_share(hits_E, torch.ones_like(hits_E))
    nine_times = clustered_share(9 * hits_E, torch.full_like(hits_E, 9))
    assert_close(torch.stack(nine_times), torch.stack(once))


def test_agreement_within_groups_widens_and_disagreement_narrows() -> None:
    counts_E = torch.full((40,), 5.0, dtype=torch.float64)
    agree_E = torch.where(torch.arange(40) % 2 == 0, 5.0, 0.0).double()  # all five or none
    mixed_E = torch.where(torch.arange(40) % 2 == 0, 3.0, 2.0).double()  # never far from half

    def width(hits_E: Tensor) -> float:
        _, low, high = clustered_share(hits_E, counts_E)
        return (high - low).item()

    binomial = 2 * 1.96 * math.sqrt(0.25 / 200)
    # A group that agrees is one observation: sqrt(5) times wider. Residuals of +-1/2 for +-5/2: five times narrower.
    assert width(agree_E) == pytest.approx(math.sqrt(5) * binomial * math.sqrt(40 / 39))
    assert width(mixed_E) == pytest.approx(width(agree_E) / 5)


# Kills: clamp dropped; clamp of one end only.
def test_ends_stay_in_0_1_and_order_does_not_matter() -> None:
    few, low, high = clustered_share(double(0, 1, 0), double(2, 2, 2))
    assert low == 0.0
    assert high <= 1.0
    assert_close(torch.stack(clustered_share(double(1, 0, 0), double(2, 2, 2))), torch.stack([few, low, high]))
    assert clustered_share(double(2, 1, 2), double(2, 2, 2))[2] == 1.0


def test_integer_counts_are_taken_too() -> None:
    share, _, _ = clustered_share(torch.tensor([1, 0]), torch.tensor([2, 2]))
    assert share.item() == 0.25


# Kills: empty groups counted among the groups.
def test_a_group_without_observations_changes_nothing() -> None:
    with_empty = clustered_share(double(3, 0, 1, 0, 2), double(4, 0, 4, 0, 2))
    assert_close(torch.stack(with_empty), torch.stack(clustered_share(double(3, 1, 2), double(4, 4, 2))))


def test_no_observation_is_nan() -> None:
    assert torch.stack(clustered_share(torch.zeros(0), torch.zeros(0))).isnan().all()
    assert torch.stack(clustered_share(torch.zeros(3), torch.zeros(3))).isnan().all()


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    generator = torch.Generator().manual_seed(0)
    rounds, groups, size = 400, 60, 6
    # Each group has its own chance; its six observations share it, so the mean chance is 1/2 but groups agree.
    chance_RE = torch.rand(rounds, groups, generator=generator)
    hits_RE = (torch.rand(rounds, groups, size, generator=generator) < chance_RE[..., None]).sum(-1)
    counts_E = torch.full((groups,), size)
    ends = [clustered_share(hits_E, counts_E)[1:] for hits_E in hits_RE]
    covered = sum(bool(low <= 0.5 <= high) for low, high in ends) / rounds
    # 95 % nominal; standard error 1.1 %. An interval that takes pairs for independent covers 77 %.
    assert 0.92 <= covered <= 0.98
