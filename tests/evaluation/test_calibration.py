from __future__ import annotations

import numpy as np
import pytest
import torch
from torchmetrics.functional.classification import binary_calibration_error

from lit_align.evaluation.calibration import (
    best_temperature,
    brier_score,
    calibration_error,
    choice_calibration,
    reliability,
)


def test_the_error_is_that_of_torchmetrics() -> None:
    rng = np.random.default_rng(0)
    confidence = rng.random(500)
    hit = (rng.random(500) < confidence**2).astype(float)
    for bins in (10, 15):
        theirs = binary_calibration_error(torch.tensor(confidence), torch.tensor(hit).long(), n_bins=bins)
        assert calibration_error(confidence, hit, bins) == pytest.approx(theirs.item(), abs=1e-6)
    rows = reliability(confidence, hit)
    assert sum(row["count"] for row in rows) == 500
    assert all(row["low"] < row["confidence"] <= row["high"] for row in rows)


def test_a_uniform_predictor_is_wrong_by_how_far_accuracy_is_from_a_quarter() -> None:
    answers = np.array([0, 0, 0, 1, 2, 3, 0, 0])
    told = choice_calibration(np.zeros((8, 4)), answers, resamples=50)
    # Answers that tie share the credit: a uniform predictor is right a quarter of the time.
    assert told["accuracy"].value == 0.25
    assert told["ece_10"].value == pytest.approx(0.0)
    assert told["brier"].value == pytest.approx(0.75)
    assert told["nll"] == pytest.approx(np.log(4))
    # A tiny preference for the first makes it right 5 of 8 times at a confidence of a quarter.
    told = choice_calibration(np.zeros((8, 4)) + np.array([1e-6, 0, 0, 0]), answers, resamples=50)
    assert told["ece_10"].value == pytest.approx(abs(5 / 8 - 0.25), abs=1e-5)


def test_the_temperature_that_repairs() -> None:
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(4000, 4)) * 2
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    answers = np.array([rng.choice(4, p=row) for row in p])
    told = choice_calibration(logits * 2.5, answers, resamples=50)
    assert told["temperature"] == pytest.approx(2.5, rel=0.06)
    assert told["ece_10_repaired"] < 0.03 < told["ece_10_unrepaired"]
    assert told["ece_10"].low > 0.05
    assert best_temperature(logits, p) == pytest.approx(1.0, abs=1e-3)


def test_shares_of_annotators_are_outcomes() -> None:
    assert calibration_error([0.7, 0.7], [0.7, 0.7]) == pytest.approx(0)
    assert calibration_error([0.7, 0.7], [1.0, 1.0]) == pytest.approx(0.3)
    assert brier_score([0.5, 1.0], [1.0, 1.0]).tolist() == [0.25, 0.0]
    with pytest.raises(ValueError, match=r"lie in \[0, 1\]"):
        calibration_error([1.5], [1.0])
    with pytest.raises(ValueError, match="1 questions have a log-probability that is NaN"):
        choice_calibration([[0.0, np.nan]], [0])
