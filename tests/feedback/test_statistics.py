"""Agreement equals what hand computation and published tables give."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchmetrics.functional import cohen_kappa as torch_cohen
from torchmetrics.functional.nominal import fleiss_kappa as torch_fleiss

from lit_align.feedback.statistics import (
    by_cluster,
    clustered,
    cohen_kappa,
    distances,
    fleiss_kappa,
    krippendorff_alpha,
    pairwise_agreement,
)

_ = np.nan
# Krippendorff 2011, section C: four observers, twelve units, missing data.
PUBLISHED = np.array(
    [
        [1, 2, 3, 3, 2, 1, 4, 1, 2, _, _, _],
        [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, _, 3],
        [_, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, _],
        [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, _],
    ]
).T


@pytest.mark.parametrize(("level", "alpha"), [("nominal", 0.743), ("ordinal", 0.815), ("interval", 0.849)])
def test_alpha_is_that_of_the_publication(level, alpha: float) -> None:
    assert krippendorff_alpha(PUBLISHED, level, resamples=0).value == pytest.approx(alpha, abs=5e-4)


# Two annotators, four units and a fifth that one of them left out:
#   unit 1: a a, unit 2: a b, unit 3: b b, unit 4: c c, unit 5: c -
# Coincidences: aa 2, ab 1, ba 1, bb 2, cc 2; totals a 3, b 3, c 2; n = 8.
SMALL = np.array([[1, 1], [1, 2], [2, 2], [4, 4], [4, _]], dtype=float)


def test_alpha_by_hand() -> None:
    # Nominal: D_o = 2 / 8; D_e = (8^2 - (9 + 9 + 4)) / (8 * 7) = 42 / 56.
    assert krippendorff_alpha(SMALL, "nominal", resamples=0).value == pytest.approx(1 - (2 / 8) / (42 / 56))
    # Interval: ab 1, ac 9, bc 4. D_o = 2 * 1 / 8; D_e = 2 * (9 * 1 + 6 * 9 + 6 * 4) / 56.
    assert krippendorff_alpha(SMALL, "interval", resamples=0).value == pytest.approx(1 - (2 / 8) / (174 / 56))
    # Ordinal: ab (3/2 + 3/2)^2 = 9, ac (3/2 + 3 + 1)^2 = 30.25, bc (3/2 + 1)^2 = 6.25.
    far = distances(np.array([1.0, 2.0, 4.0]), np.array([3.0, 3.0, 2.0]), "ordinal")
    np.testing.assert_allclose(far, [[0, 9, 30.25], [9, 0, 6.25], [30.25, 6.25, 0]])
    expected = 2 * (9 * 9 + 6 * 30.25 + 6 * 6.25) / 56
    assert krippendorff_alpha(SMALL, "ordinal", resamples=0).value == pytest.approx(1 - (2 * 9 / 8) / expected)


def test_alpha_is_1_for_agreement_near_0_for_chance_and_undefined_without_variation() -> None:
    rng = np.random.default_rng(0)
    same = np.repeat(rng.integers(0, 3, (50, 1)), 3, axis=1).astype(float)
    assert krippendorff_alpha(same, resamples=0).value == 1.0
    assert abs(krippendorff_alpha(rng.integers(0, 2, (5000, 3)).astype(float), resamples=0).value) < 0.03
    assert np.isnan(krippendorff_alpha(np.ones((5, 3)), resamples=0).value)
    assert np.isnan(krippendorff_alpha(np.array([[1.0, _], [_, 2.0]]), resamples=0).value)
    assert np.isnan(krippendorff_alpha(np.full((3, 2), _), resamples=0).value)


def test_the_order_of_annotators_and_units_does_not_matter() -> None:
    shuffled = PUBLISHED[np.random.default_rng(1).permutation(12)][:, [2, 0, 3, 1]]
    for level in ("nominal", "ordinal", "interval"):
        one, other = (krippendorff_alpha(table, level, resamples=0).value for table in (PUBLISHED, shuffled))
        assert one == pytest.approx(other, abs=1e-12)


def test_alpha_is_that_of_evalica() -> None:
    evalica = pytest.importorskip("evalica", reason="evalica is an oracle of development alone")
    pandas = pytest.importorskip("pandas")
    for level in ("nominal", "ordinal", "interval"):
        theirs = evalica.alpha(pandas.DataFrame(PUBLISHED.T), distance=level)
        assert krippendorff_alpha(PUBLISHED, level, resamples=0).value == pytest.approx(theirs.alpha, abs=1e-9)


def test_cohen_by_hand_and_against_torchmetrics() -> None:
    # 20 yes/yes, 5 yes/no, 10 no/yes, 15 no/no: observed 0.7, expected 0.5.
    first = np.repeat([1.0, 1.0, 0.0, 0.0], [20, 5, 10, 15])
    second = np.repeat([1.0, 0.0, 1.0, 0.0], [20, 5, 10, 15])
    assert cohen_kappa(first, second, resamples=0).value == pytest.approx(0.4)
    missing = np.append(first, [1.0, _]), np.append(second, [_, 0.0])
    assert cohen_kappa(*missing, resamples=0).value == pytest.approx(0.4)
    rng = np.random.default_rng(2)
    one = rng.integers(0, 4, 300)
    two = np.where(rng.random(300) < 0.6, one, rng.integers(0, 4, 300))
    for weights in ("none", "linear", "quadratic"):
        theirs = torch_cohen(
            torch.tensor(one), torch.tensor(two), task="multiclass", num_classes=4,
            weights=None if weights == "none" else weights,
        )  # fmt: skip
        ours = cohen_kappa(one.astype(float), two.astype(float), weights, resamples=0).value
        assert ours == pytest.approx(float(theirs), abs=1e-5)
    assert np.isnan(cohen_kappa(np.array([1.0, _]), np.array([_, 1.0]), resamples=0).value)


# Fleiss 1971, the worked example of the method that is best known: 10 subjects, 14 raters, 5 categories.
FLEISS = [
    [0, 0, 0, 0, 14], [0, 2, 6, 4, 2], [0, 0, 3, 5, 6], [0, 3, 9, 2, 0], [2, 2, 8, 1, 1],
    [7, 7, 0, 0, 0], [3, 2, 6, 3, 0], [2, 5, 3, 2, 2], [6, 5, 2, 1, 0], [0, 2, 2, 3, 7],
]  # fmt: skip


def test_fleiss_is_that_of_the_worked_example_and_of_torchmetrics() -> None:
    table = np.array([np.repeat(np.arange(5.0), row) for row in FLEISS])
    ours = fleiss_kappa(table, resamples=0).value
    assert ours == pytest.approx(0.210, abs=5e-4)
    assert ours == pytest.approx(float(torch_fleiss(torch.tensor(FLEISS), mode="counts")), abs=1e-5)


def test_pairwise_agreement_by_hand() -> None:
    # Unit 1: three of three twos agree; unit 2: one of three; unit 3: one rating; unit 4: none of one.
    table = np.array([[1, 1, 1], [1, 1, 0], [1, _, _], [0, 1, _]], dtype=float)
    assert pairwise_agreement(table, np.arange(4), 0).value == pytest.approx(4 / 7)
    assert np.isnan(pairwise_agreement(table[2:3], np.arange(1), 0).value)


def test_an_interval_covers_the_truth_as_often_as_it_says_and_resamples_clusters() -> None:
    rng, covered = np.random.default_rng(3), 0
    for trial in range(200):
        cluster_E = rng.normal(size=60)
        parts = np.stack([cluster_E * 5, np.full(60, 5.0)], axis=1)  # five copies of one value: one observation
        mean, low, high = clustered(lambda sums: sums[0] / sums[1], parts, 300, seed=trial)
        assert mean == pytest.approx(cluster_E.mean())
        covered += low <= 0 <= high
    assert 180 <= covered <= 199
    unclustered = clustered(lambda s: s[0] / s[1], np.repeat(parts / 5, 5, axis=0), 300)
    assert high - low > 1.8 * (unclustered.high - unclustered.low)


def test_no_interval_without_two_clusters() -> None:
    value, low, high = clustered(lambda sums: float(sums[0]), np.array([[3.0]]))
    assert value == 3.0
    assert np.isnan(low)
    assert np.isnan(high)


def test_the_same_seed_gives_the_same_interval() -> None:
    assert krippendorff_alpha(PUBLISHED) == krippendorff_alpha(PUBLISHED)
    value, low, high = krippendorff_alpha(PUBLISHED)
    assert low < value < high


def test_units_add_up_by_cluster() -> None:
    np.testing.assert_array_equal(by_cluster(np.array([[1.0], [2.0], [4.0]]), np.array([1, 0, 1])), [[2.0], [5.0]])
