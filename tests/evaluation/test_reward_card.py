from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lit_align.data.rows import Tally
from lit_align.data.source import Source
from lit_align.evaluation.comparisons import Comparison, pairs_of, read_comparisons
from lit_align.evaluation.intervals import plain
from lit_align.evaluation.length import words
from lit_align.evaluation.reward_card import agreement, report_card


def comparisons(number: int = 300, answers: int = 2, seed: int = 0, **told: Any) -> list[Comparison]:
    """Answers of random quality; a better one is longer in 7 of 10."""
    rng = np.random.default_rng(seed)
    made = []
    for n in range(number):
        quality = rng.normal(size=answers)
        order = np.argsort(np.argsort(quality))
        length = 10 + 5 * (order if rng.random() < 0.7 else -order) + 30
        texts = ["w " * int(k) for k in length]
        ranks = list(-quality)
        made.append(Comparison(n, texts, texts, ranks, [True] * answers, [], list(quality), None, str(n // 2)))
    return [one._replace(**told) for one in made]


def lengths(made: list[Comparison], sign: int = 1) -> list[list[float]]:
    return [[sign * float(words(text)) for text in one.texts] for one in made]


def test_a_model_of_length_alone_is_exposed_by_its_own_columns() -> None:
    made = comparisons()
    card = report_card(made, lengths(made), resamples=200)
    assert card["accuracy"] == card["longer_wins"]
    assert card["model_picks_longer"].value == 1.0
    assert card["accuracy_length_balanced"].value == 0.5
    assert (card["accuracy_longer_is_better"].value, card["accuracy_shorter_is_better"].value) == (1.0, 0.0)
    assert card["length"]["pearson"].value == pytest.approx(1.0)
    assert card["longer_wins"].value + card["shorter_wins"].value == pytest.approx(1.0)
    short = report_card(made, lengths(made, -1), resamples=200)
    assert short["accuracy"] == short["shorter_wins"]


def test_a_model_that_knows_quality() -> None:
    made = comparisons(answers=4)
    card = report_card(made, [one.grades for one in made], resamples=200)
    assert (card["pairs"], card["prompts"], card["accuracy"].value) == (300 * 6, 150, 1.0)
    assert card["accuracy"].low < 1.0
    # Its best of n is the judge's own.
    assert [row["n"] for row in card["best_of_n"]] == [2, 4]
    for row in card["best_of_n"]:
        assert row["gain"].value == pytest.approx(row["gain_of_the_judge"])
    # The best of 4 normal draws is 1.03 deviations above the mean.
    assert card["best_of_n"][1]["gain"].value == pytest.approx(1.03, abs=0.1)
    assert [row["accuracy"].value for row in card["by_margin"]] == [1.0] * 5


def test_a_calibrated_model_has_no_error_and_annotators_a_ceiling() -> None:
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(1500, 2)) * 1.5
    share = 1 / (1 + np.exp(scores[:, 1] - scores[:, 0]))
    made = comparisons(1500)
    made = [one._replace(shares=[float(s)], ranks=[1 - s, s]) for one, s in zip(made, share, strict=True)]
    card = report_card(made, scores.tolist(), resamples=100)
    assert card["accuracy"].value == 1.0
    assert card["annotators_with_majority"].value == pytest.approx(np.maximum(share, 1 - share).mean())
    told = card["calibration"]
    assert told["ece_10"].value == pytest.approx(0, abs=1e-9)
    assert told["brier"].value == pytest.approx(0, abs=1e-12)
    assert told["temperature"] == pytest.approx(1.0, abs=1e-3)
    # One label a pair, drawn with that probability.
    first = rng.random(1500) < share
    labelled = [one._replace(shares=[], ranks=[float(not f), float(f)]) for one, f in zip(made, first, strict=True)]
    sure = report_card(labelled, (scores * 3).tolist(), resamples=100)
    assert sure["annotators_with_majority"] is None
    assert sure["calibration"]["temperature"] == pytest.approx(3.0, rel=0.1)
    assert sure["calibration"]["ece_10"].low > 0.05
    right = report_card(labelled, scores.tolist(), resamples=100)
    assert right["calibration"]["ece_10"].value < 0.04
    assert right["calibration"]["brier"].value < right["calibration"]["brier_of_no_opinion"]


def test_ties_and_scores_that_are_none_are_counted() -> None:
    made = comparisons(4)
    made[0] = made[0]._replace(ranks=[0.0, 0.0])
    made[1] = made[1]._replace(texts=["", "w"])
    card = report_card(made, [[0.0, 1.0], [np.nan, 1.0], [1.0, 1.0], [np.inf, 0.0]], resamples=50)
    counted = ("pairs", "ties_in_the_labels", "pairs_without_a_score", "equal_scores", "empty_answers")
    assert [card[name] for name in counted] == [1, 1, 2, 1, 1]
    assert card["accuracy"].value == 0.5
    json.dumps(plain(card), allow_nan=False)
    with pytest.raises(ValueError, match="no pair to measure: 4 comparisons have 1 ties, and 3 pairs have a score"):
        report_card(made, [[np.nan, np.nan]] * 4)


def test_categories_and_a_second_model() -> None:
    made = comparisons(200)
    made = [one._replace(category="odd" if n % 2 else "even") for n, one in enumerate(made)]
    quality = [one.grades for one in made]
    half = [one.grades if one.category == "odd" else [-g for g in one.grades] for one in made]
    card = report_card(made, half, resamples=50)
    assert {name: of["accuracy"].value for name, of in card["by_category"].items()} == {"even": 0.0, "odd": 1.0}
    told = agreement(made, quality, half, resamples=50)
    assert (told["agreement"].value, told["right_where_they_differ"].value) == (0.5, 1.0)
    assert told["accuracy_gain"].value == 0.5


def test_reading(tmp_path: Path) -> None:
    rows = [
        {"prompt": "a", "chosen": "yes", "rejected": "no", "kind": "x"},
        {"prompt": "a", "chosen": "yes", "rejected": 3, "kind": "x"},
        {"prompt": "b", "completions": ["u", "v", "w"], "shares": [0.5, 0.75, 0.25], "kind": "y"},
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tally = Tally()
    read = read_comparisons(Source(str(path)), tally, "kind")
    assert [one.category for one in read] == ["x", "y"]
    assert (tally["rows"], tally["skipped"]) == (3, 1)
    assert "row 2: field 'rejected'" in str(tally.first_skipped)
    pairs = pairs_of(read)
    assert (pairs.ties, pairs.several) == (1, True)
    assert list(zip(pairs.better_P, pairs.worse_P, pairs.share_P, strict=True)) == [
        (0, 1, 1),
        (0, 2, 0.75),
        (2, 1, 0.75),
    ]
    with pytest.raises(ValueError, match=r"holds no comparison.*field 'group' is missing; the row has 'prompt'"):
        read_comparisons(Source(str(path)), Tally(), "group")


@pytest.mark.realdata
def test_shorter_wins_on_harmless_pairs(realdata: Path) -> None:
    made = read_comparisons(Source(str(realdata / "hh_rlhf" / "harmless-base-test.jsonl.gz")), Tally())
    assert len(made) == 2312 - 5  # five answer different dialogues
    card = report_card(made, lengths(made, -1), resamples=200)
    assert card["accuracy"] == card["shorter_wins"]
    assert card["shorter_wins"].value == pytest.approx(0.56, abs=0.015)
