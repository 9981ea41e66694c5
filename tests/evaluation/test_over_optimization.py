from __future__ import annotations

from itertools import combinations
from math import exp, log, sqrt

import numpy as np
import pytest

from lit_align.evaluation.over_optimization import Fit, best_of_n, best_of_n_curve, fit, fit_with_intervals


def brute_force(proxy: list[float], gold: list[float], n: int) -> float:
    means = []
    for subset in combinations(range(len(proxy)), n):
        top = max(proxy[i] for i in subset)
        means.append(np.mean([gold[i] for i in subset if proxy[i] == top]))
    return float(np.mean(means))


@pytest.mark.parametrize("n", [1, 2, 3, 6, 7])
def test_best_of_n_is_the_mean_over_all_subsets(n: int) -> None:
    rng = np.random.default_rng(n)
    proxy, gold = rng.normal(size=(2, 4, 7))
    expected = [brute_force(p, g, n) for p, g in zip(proxy.tolist(), gold.tolist(), strict=True)]
    np.testing.assert_allclose(best_of_n(proxy, gold, n), expected, rtol=1e-12)


def test_answers_that_the_proxy_does_not_tell_apart_win_in_turn() -> None:
    proxy = np.array([[0.0, 0.0, 1.0, 1.0], [2.0, 2.0, 2.0, 2.0], [-np.inf, -np.inf, 0.0, 1.0]])
    gold = np.array([[1.0, 3.0, 5.0, 8.0], [1.0, 2.0, 3.0, 6.0], [1.0, 2.0, 3.0, 6.0]])
    # Of subsets without a tie at the top, and with one, every order of the tied answers is as likely.
    permuted = best_of_n(proxy[:, ::-1], gold[:, ::-1], 2)
    np.testing.assert_allclose(best_of_n(proxy, gold, 2), permuted)
    # Pairs (0,1) -> 2, (0,2), (1,2) -> 5, (0,3), (1,3) -> 8, (2,3) -> 6.5.
    assert best_of_n(proxy, gold, 2)[0] == pytest.approx((2 + 5 + 5 + 8 + 8 + 6.5) / 6)
    assert best_of_n(proxy, gold, 2)[1] == pytest.approx(3.0)


def test_large_counts_do_not_overflow() -> None:
    rng = np.random.default_rng(0)
    proxy = rng.normal(size=(3, 4096))
    np.testing.assert_allclose(best_of_n(proxy, proxy, 4096), proxy.max(1))
    np.testing.assert_allclose(best_of_n(proxy, np.ones_like(proxy), 1024), 1.0)


def test_refused() -> None:
    with pytest.raises(ValueError, match="best of 5 needs n between 1 and the 4 samples"):
        best_of_n(np.zeros((2, 4)), np.zeros((2, 4)), 5)
    with pytest.raises(ValueError, match="NaN"):
        best_of_n([[np.nan, 1.0]], [[0.0, 1.0]], 1)
    with pytest.raises(ValueError, match="two different distances"):
        fit([0.0, 1.0, 1.0], [0.0, 1.0, 1.0], "rl")


@pytest.mark.parametrize("form", ["best_of_n", "rl"])
def test_fits_recover_planted_coefficients(form) -> None:
    planted = Fit(form, 1.4, 0.35)
    d = np.linspace(0, 5, 12)
    exact = fit(d, planted(d), form)
    assert (exact.a, exact.b) == (pytest.approx(1.4), pytest.approx(0.35))
    rng = np.random.default_rng(0)
    held_out = [9, 10, 11]
    covered = 0
    for repeat in range(40):
        # Prompts differ in how much they gain, and every point is noisy.
        noisy = planted(d) * rng.uniform(0.5, 1.5, (200, 1)) + rng.normal(size=(200, 12))
        told = fit_with_intervals(d, noisy, form, held_out, resamples=200, seed=repeat)
        covered += all(told[name].low <= value <= told[name].high for name, value in (("a", 1.4), ("b", 0.35)))
    assert covered >= 34
    assert told["peak_d"].low < planted.peak[0] < told["peak_d"].high
    assert told["held_out"]["rmse"] < told["held_out"]["rmse_flat"]
    assert told["no_peak"] < 0.2


def test_peaks() -> None:
    d, reward = Fit("best_of_n", 2.0, 0.5).peak
    assert (d, reward) == (2.0, 2.0)
    d, reward = Fit("rl", 2.0, 1.0).peak
    assert (d, reward) == (pytest.approx(exp(1)), pytest.approx(exp(1)))
    assert d * (2.0 - log(d)) == pytest.approx(reward)
    assert Fit("rl", 1.0, -0.1).peak == (np.inf, np.inf)
    assert Fit("rl", 1.0, 1.0)(0.0) == 0.0


def test_the_curve_of_best_of_n() -> None:
    rng = np.random.default_rng(0)
    gold = rng.normal(size=(50, 256))
    # A proxy whose errors have heavy tails is over-optimised: its best answers are its worst mistakes.
    proxy = gold + rng.standard_t(1.5, size=gold.shape)
    told = best_of_n_curve(proxy, gold, most_fitted=32, resamples=200)
    assert [point["n"] for point in told["points"]] == [1, 2, 4, 8, 16, 32, 64, 128, 256]
    assert told["points"][3]["d"] == pytest.approx(sqrt(log(8) - 7 / 8))
    assert told["points"][0]["gold"].value == pytest.approx(0)
    proxies, golds = ([point[name].value for point in told["points"]] for name in ("proxy", "gold"))
    assert proxies == sorted(proxies)
    assert max(golds) > golds[-1] + 0.1
    assert told["fit"]["held_out"]["d"] == [pytest.approx(sqrt(log(n) - 1 + 1 / n)) for n in (64, 128, 256)]
    assert best_of_n_curve(proxy[:, :2], gold[:, :2])["no_fit"] == "two coefficients need n = 2 and 4, got 2 samples"
