from __future__ import annotations

import numpy as np
import pytest

from lit_align.evaluation.length import (
    explained_variance,
    length_balanced,
    length_controlled_win_rate,
    length_correlation,
    within_bucket_gain,
)


def test_singhal_s_worked_example() -> None:
    # Two buckets: 8 short and 2 long answers before, 2 and 8 after, each 0.05 better.
    before = [0.10] * 8 + [0.60] * 2, [5] * 8 + [25] * 2
    after = [0.15] * 2 + [0.65] * 8, [5] * 2 + [25] * 8
    told = within_bucket_gain(*before, *after)
    assert (told["gain"], told["within"]) == (pytest.approx(0.35), pytest.approx(0.05))
    assert told["ratio"] == pytest.approx(0.143, abs=5e-4)
    assert told["outside"] == 0


def test_buckets_that_one_policy_reaches_are_counted() -> None:
    told = within_bucket_gain([0.0, 1.0], [5, 25], [0.5, 3.0], [5, 90])
    assert (told["within"], told["outside"]) == (0.5, 0.5)
    assert np.isnan(within_bucket_gain([0.0], [5], [1.0], [90])["within"])


def test_correlation_within_prompts_leaves_prompts_out() -> None:
    rng = np.random.default_rng(0)
    prompts = np.repeat(np.arange(80), 4)
    wanted = rng.normal(size=80)[prompts] * 30
    length = 100 + wanted + rng.normal(size=320)
    # Rewards follow what the prompt asks for, not what the answer's length is among its prompt's.
    told = length_correlation(wanted + rng.normal(size=320), length, prompts, resamples=100)
    assert told["pearson"].value > 0.95
    assert told["within_prompt"].low < 0 < told["within_prompt"].high
    assert np.isnan(length_correlation([1.0, 1.0, 1.0], [1, 2, 3], [0, 1, 2])["pearson"].value)


def test_explained_variance() -> None:
    rng = np.random.default_rng(0)
    length = rng.normal(size=2000)
    told = explained_variance(3 * length + 4 * rng.normal(size=2000), length, range(2000), resamples=100)
    assert told.low < 9 / 25 < told.high
    assert told.high - told.low < 0.1


def test_a_judge_of_length_alone_gives_one_half_at_equal_length() -> None:
    rng = np.random.default_rng(0)
    difference = rng.normal(20, 30, 600)
    won = (difference > 0).astype(float)
    assert won.mean() > 0.7
    told = length_controlled_win_rate(won, difference, range(600), resamples=60)
    assert told.value == pytest.approx(0.5, abs=0.08)
    # A policy that is better whatever its length keeps its rate.
    better = (rng.random(600) < 0.8).astype(float)
    assert length_controlled_win_rate(better, difference, range(600), resamples=60).value == pytest.approx(
        0.8, abs=0.05
    )


def test_a_balanced_subset() -> None:
    rng = np.random.default_rng(0)
    difference = np.round(rng.normal(15, 30, 3000))
    kept = length_balanced(difference)
    assert abs((difference[kept] > 0).sum() - (difference[kept] < 0).sum()) == 0
    assert set(np.flatnonzero(difference == 0)) <= set(kept)
    assert np.abs(difference[kept][difference[kept] > 0]).mean() == pytest.approx(
        np.abs(difference[kept][difference[kept] < 0]).mean(), rel=0.1
    )
    assert kept.tolist() == length_balanced(difference).tolist()
