from __future__ import annotations

import json

import numpy as np
import pytest

from lit_align.evaluation.intervals import mean_interval, numbered, plain, statistic_interval


def test_the_interval_covers_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    groups = np.repeat(np.arange(60), 4)
    covered = wrong = 0
    for repeat in range(200):
        # Answers to one prompt agree: an interval over single answers is too narrow.
        of_prompt = rng.random(60)
        hits = (rng.random(240) < of_prompt[groups]).astype(float)
        mean = mean_interval(hits, groups, share=True, resamples=300, seed=repeat)
        covered += mean.low <= 0.5 <= mean.high
        alone = mean_interval(hits, range(240), share=True, resamples=300, seed=repeat)
        wrong += alone.low <= 0.5 <= alone.high
    assert 180 <= covered <= 198
    assert wrong < covered - 8


def test_the_mean_weighs_observations_and_the_seed_decides() -> None:
    values, groups = [1.0, 0.0, 0.0, 0.5, 0.2], ["a", "b", "b", "b", "c"]
    mean = mean_interval(values, groups)
    assert (mean.value, mean.observations, mean.clusters) == (pytest.approx(0.34), 5, 3)
    assert mean == mean_interval(values, groups)
    many = np.random.default_rng(0).random(100)
    assert mean_interval(many, range(100)) != mean_interval(many, range(100), seed=1)


def test_large_clusters_weigh_as_many_observations() -> None:
    sizes = np.array([1, 9] * 50)
    mean = mean_interval(np.repeat(np.array([1.0, 0.0] * 50), sizes), np.repeat(range(100), sizes))
    assert mean.value == pytest.approx(0.1)
    assert 0.05 < mean.low < 0.1 < mean.high < 0.15


def test_a_share_without_misses_has_an_interval() -> None:
    every = mean_interval([1.0] * 20, np.repeat(range(10), 2), share=True)
    # Clopper and Pearson for 10 of 10: 0.025 ** (1 / 10).
    assert (every.low, every.high) == (pytest.approx(0.025**0.1), 1.0)
    assert mean_interval([0.0] * 10, range(10), share=True).high == pytest.approx(1 - 0.025**0.1)


def test_what_has_no_interval() -> None:
    assert np.isnan(mean_interval([], []).value)
    one = mean_interval([0.0, 1.0], ["same", "same"])
    assert one.value == 0.5
    assert np.isnan(one.low)
    with pytest.raises(ValueError, match="1 of 2 values are NaN"):
        mean_interval([1.0, np.nan], [0, 1])
    with pytest.raises(ValueError, match="2 values and 3 clusters"):
        mean_interval([1.0, 0.0], [0, 1, 2])


def test_any_statistic() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=300)
    y = x + rng.normal(size=300)
    interval = statistic_interval(lambda i: float(np.corrcoef(x[i], y[i])[0, 1]), range(300))
    # Fisher's interval of a correlation.
    r = np.corrcoef(x, y)[0, 1]
    low, high = np.tanh(np.arctanh(r) + np.array([-1.96, 1.96]) / np.sqrt(297))
    assert (interval.value, interval.low, interval.high) == (
        pytest.approx(r),
        pytest.approx(low, abs=0.02),
        pytest.approx(high, abs=0.02),
    )


def test_json_has_no_nan() -> None:
    told = {"a": mean_interval([], []), 1: [np.float64("inf"), np.int64(3)], "x": np.array([1.0, np.nan])}
    assert json.loads(json.dumps(plain(told), allow_nan=False)) == {
        "a": {"value": None, "low": None, "high": None, "observations": 0, "clusters": 0},
        "1": [None, 3],
        "x": [1.0, None],
    }
    assert numbered(["b", "a", "b"]).tolist() == [0, 1, 0]
