from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from lit_align.feedback.truth import dawid_skene, log_odds_weights, plackett_luce


def simulated(units: int, accuracies: list[float], seed: int, classes: int = 2, share: float = 1.0):
    """Ratings of annotators of these accuracies, whose errors are spread evenly; and the truth."""
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, classes, units)
    rows = [
        (u, a, truth[u] if rng.random() < accuracy else (truth[u] + rng.integers(1, classes)) % classes)
        for u in range(units)
        for a, accuracy in enumerate(accuracies)
        if rng.random() < share
    ]
    unit, annotator, said = (np.array(column) for column in zip(*rows, strict=True))
    _, unit = np.unique(unit, return_inverse=True)
    return unit, annotator, said, truth


def by_loops(unit, annotator, said, classes: int, iterations: int) -> list[list[float]]:
    """Dawid and Skene's equations 2.3 to 2.5, written out one number at a time."""
    ratings = list(zip(unit.tolist(), annotator.tolist(), said.tolist(), strict=True))
    units, annotators = max(unit) + 1, max(annotator) + 1
    T = [[0.0] * classes for _ in range(units)]
    for i, _, k in ratings:
        T[i][k] += 1
    T = [[t / sum(row) for t in row] for row in T]
    for _ in range(iterations):
        p = [sum(T[i][j] for i in range(units)) / units for j in range(classes)]
        pi = [[[1e-10] * classes for _ in range(classes)] for _ in range(annotators)]
        for i, a, k in ratings:
            for j in range(classes):
                pi[a][j][k] += T[i][j]
        pi = [[[cell / sum(row) for cell in row] for row in table] for table in pi]
        new = []
        for i in range(units):
            likelihood = list(p)
            for ii, a, k in ratings:
                if ii == i:
                    likelihood = [value * pi[a][j][k] for j, value in enumerate(likelihood)]
            new.append([value / sum(likelihood) for value in likelihood])
        T = new
    return T


@pytest.mark.parametrize("classes", [2, 3])
def test_dawid_skene_is_an_independent_writing_of_the_equations(classes: int) -> None:
    unit, annotator, said, _ = simulated(30, [0.9, 0.7, 0.6, 0.4], 0, classes, share=0.8)
    ours = dawid_skene(unit, annotator, said, classes, iterations=7, tolerance=0)
    np.testing.assert_allclose(ours.posterior_UC, by_loops(unit, annotator, said, classes, 7), atol=1e-6)
    assert ours.iterations == 7


def test_dawid_skene_is_that_of_crowd_kit() -> None:
    aggregation = pytest.importorskip("crowdkit.aggregation", reason="crowd-kit is an oracle of development alone")
    pandas = pytest.importorskip("pandas")
    unit, annotator, said, _ = simulated(200, [0.9, 0.8, 0.6, 0.5], 1, 3, share=0.7)
    frame = pandas.DataFrame({"task": unit, "worker": annotator, "label": said})
    theirs = aggregation.DawidSkene(n_iter=60, tol=0).fit_predict_proba(frame)
    ours = dawid_skene(unit, annotator, said, 3, iterations=60, tolerance=0)
    np.testing.assert_allclose(ours.posterior_UC, theirs[[0, 1, 2]].to_numpy(), atol=1e-4)


def test_the_likelihood_never_falls() -> None:
    unit, annotator, said, _ = simulated(80, [0.9, 0.7, 0.5], 2)
    steps = [dawid_skene(unit, annotator, said, 2, iterations=n, tolerance=0).log_likelihood for n in range(1, 12)]
    assert all(later >= earlier - 1e-9 for earlier, later in itertools.pairwise(steps))


def test_accuracies_come_out_and_careless_annotators_are_outvoted() -> None:
    accuracies = [0.9] * 4 + [0.5] * 3
    unit, annotator, said, truth = simulated(2000, accuracies, 3)
    found = dawid_skene(unit, annotator, said, 2)
    np.testing.assert_allclose(found.accuracy(), accuracies, atol=0.04)
    majority = np.array([np.bincount(said[unit == u], minlength=2).argmax() for u in range(2000)])
    right = (found.posterior_UC.argmax(1) == truth).mean()
    assert right > (majority == truth).mean() + 0.03


def test_mirrored_errors_do_not_depend_on_which_side_is_the_first() -> None:
    unit, annotator, said, _ = simulated(100, [0.9, 0.7, 0.6], 4, 3)
    rng = np.random.default_rng(5)
    swapped = rng.random(100) < 0.5
    mirror = np.array([1, 0, 2])
    turned = np.where(swapped[unit], mirror[said], said)
    one, other = (dawid_skene(unit, annotator, s, 3, smoothing=0.5, mirror=mirror) for s in (said, turned))
    expected = np.where(swapped[:, None], one.posterior_UC[:, mirror], one.posterior_UC)
    np.testing.assert_allclose(other.posterior_UC, expected, atol=1e-9)
    np.testing.assert_allclose(one.confusion_ACC, one.confusion_ACC[:, mirror][:, :, mirror], atol=1e-12)


def test_dawid_skene_refuses_no_ratings() -> None:
    empty = np.array([], dtype=np.int64)
    with pytest.raises(ValueError, match="at least one rating"):
        dawid_skene(empty, empty, empty, 2)


def test_weights_are_log_odds() -> None:
    weights = log_odds_weights(np.array([0.75, 0.5, 0.2, 1.0]))
    np.testing.assert_allclose(weights, [math.log(3), 0, 0, math.log(99)])
    np.testing.assert_allclose(log_odds_weights(np.array([1 / 3, 0.6]), 3), [0, math.log(3)], atol=1e-12)


RANKINGS = [[0, 1, 2], [1, 0], [2, 0, 3], [3, 1], [0, 3, 1, 2], [2, 1], [1, 3, 0], [3, 2], [0, 2]]


def likelihood(strengths: np.ndarray) -> float:
    total = 0.0
    for ranking in RANKINGS:
        for place in range(len(ranking) - 1):
            left = strengths[ranking[place:]]
            total += left[0] - np.log(np.exp(left).sum())
    return total


def test_plackett_luce_is_at_the_maximum_of_the_likelihood() -> None:
    found = plackett_luce(RANKINGS, 4)
    assert found.mean() == pytest.approx(0, abs=1e-12)
    for item in range(4):
        step = np.eye(4)[item] * 1e-5
        assert (likelihood(found + step) - likelihood(found - step)) / 2e-5 == pytest.approx(0, abs=1e-4)


def test_plackett_luce_of_pairs_by_hand() -> None:
    # Bradley-Terry of two: 3 wins to 1.
    found = plackett_luce([[0, 1]] * 3 + [[1, 0]], 2)
    assert found[0] - found[1] == pytest.approx(math.log(3), abs=1e-6)


def test_plackett_luce_is_that_of_choix() -> None:
    choix = pytest.importorskip("choix", reason="choix is an oracle of development alone")
    theirs = choix.ilsr_rankings(4, [tuple(ranking) for ranking in RANKINGS])
    np.testing.assert_allclose(plackett_luce(RANKINGS, 4), theirs - theirs.mean(), atol=1e-5)


def test_plackett_luce_refuses_an_item_without_a_maximum() -> None:
    with pytest.raises(ValueError, match="item 0 always comes first"):
        plackett_luce([[0, 1], [0, 2], [1, 2], [2, 1]], 3)
