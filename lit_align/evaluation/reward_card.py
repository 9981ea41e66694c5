"""The report card of a reward model: accuracy beside what length alone would give, calibration, best-of-n."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from lit_align.evaluation.calibration import best_temperature, brier_score, calibration_error, reliability
from lit_align.evaluation.comparisons import Comparison, Pairs, margins, pairs_of
from lit_align.evaluation.intervals import Interval, mean_interval, statistic_interval
from lit_align.evaluation.length import length_balanced, length_correlation, words
from lit_align.evaluation.over_optimization import best_of_n

Floats = NDArray[np.float64]


def wins(margin_P: Floats) -> Floats:
    """1 where a margin is positive, 0 where negative, one half where it is 0. Shape (P,)."""
    return (np.sign(margin_P) + 1) / 2


def report_card(
    comparisons: Sequence[Comparison],
    scores: Sequence[Sequence[float]],
    buckets: int = 5,
    resamples: int = 2000,
    seed: int = 0,
) -> dict[str, Any]:
    """Everything that a set of judged answers tells of a reward model.

    Args:
        comparisons: the judged answers.
        scores: raw score of each answer of each comparison, in the unit of log-odds that training left it in; NaN
            where there is none.
        buckets: of margins, with the same number of pairs in each.
        resamples: of the bootstrap over prompts.
        seed: of all draws.

    Returns:
        Figures by name, see `docs/laboratory.md`. Every share is an `Interval` clustered by prompt.

    Raises:
        ValueError: no pair is left to measure.
    """
    pairs = pairs_of(comparisons)
    margin_P = margins(pairs, scores)
    usable_P = ~np.isnan(margin_P)
    if not usable_P.any():
        raise ValueError(
            f"no pair to measure: {len(comparisons)} comparisons have {pairs.ties} ties, and {len(margin_P)} pairs "
            "have a score that is NaN or infinite"
        )
    pairs, margin_P = _pick(pairs, usable_P), margin_P[usable_P]
    difference_P = pairs.better_words_P - pairs.worse_words_P

    def share(hits: Floats, where: NDArray[Any] | slice = slice(None)) -> Interval:
        return mean_interval(hits[where], pairs.cluster_P[where], share=True, resamples=resamples, seed=seed)

    hit_P = wins(margin_P)
    balanced = length_balanced(difference_P, seed)
    card: dict[str, Any] = {
        "pairs": len(margin_P),
        "prompts": len(np.unique(pairs.cluster_P)),
        "ties_in_the_labels": pairs.ties,
        "pairs_without_a_score": int((~usable_P).sum()),
        "empty_answers": sum(not text.strip() for one in comparisons for text in one.texts),
        "equal_scores": int((margin_P == 0).sum()),
        "accuracy": share(hit_P),
        "longer_wins": share(wins(difference_P)),
        "shorter_wins": share(wins(-difference_P)),
        "model_picks_longer": share(wins(margin_P * difference_P)),
        "accuracy_longer_is_better": share(hit_P, difference_P > 0),
        "accuracy_shorter_is_better": share(hit_P, difference_P < 0),
        "accuracy_length_balanced": share(hit_P, balanced),
        "annotators_with_majority": share(pairs.share_P) if pairs.several else None,
        "by_margin": _by_margin(margin_P, hit_P, pairs, buckets, resamples, seed),
        "by_category": _by_category(hit_P, difference_P, pairs, resamples, seed),
        "calibration": _calibration(margin_P, pairs, seed),
        "length": _length(comparisons, scores, seed),
        "best_of_n": _best_of(comparisons, scores, resamples, seed),
    }
    return card


def agreement(
    comparisons: Sequence[Comparison],
    scores: Sequence[Sequence[float]],
    others: Sequence[Sequence[float]],
    resamples: int = 2000,
    seed: int = 0,
) -> dict[str, Any]:
    """How often two reward models order two answers alike, and which of them is right where they differ.

    Args:
        comparisons: the judged answers.
        scores: of the first model.
        others: of the second.
        resamples: of the bootstrap over prompts.
        seed: of the resampling.
    """
    pairs = pairs_of(comparisons)
    first_P, second_P = margins(pairs, scores), margins(pairs, others)
    both_P = ~(np.isnan(first_P) | np.isnan(second_P))
    hit_P, other_P, cluster_P = wins(first_P[both_P]), wins(second_P[both_P]), pairs.cluster_P[both_P]
    same_P = hit_P == other_P

    def interval(values: Floats, clusters: NDArray[Any], share: bool = True) -> Interval:
        return mean_interval(values, clusters, share, resamples=resamples, seed=seed)

    return {
        "agreement": interval(same_P.astype(float), cluster_P),
        "accuracy_gain": interval(hit_P - other_P, cluster_P, share=False),
        "right_where_they_differ": interval(hit_P[~same_P], cluster_P[~same_P]),
    }


def _pick(pairs: Pairs, where_P: NDArray[Any]) -> Pairs:
    columns = {
        name: getattr(pairs, name)[where_P] for name in Pairs._fields if name.endswith("_P") and "cat" not in name
    }
    return pairs._replace(**columns, category_P=[c for c, use in zip(pairs.category_P, where_P, strict=True) if use])


def _by_margin(
    margin_P: Floats, hit_P: Floats, pairs: Pairs, buckets: int, resamples: int, seed: int
) -> list[dict[str, Any]]:
    """Accuracy of the pairs that the model is least to most sure of."""
    order = np.argsort(np.abs(margin_P), kind="stable")
    rows = []
    for part in np.array_split(order, min(buckets, len(order))):
        sure = np.abs(margin_P[part])
        rows.append(
            {
                "low": float(sure.min()),
                "high": float(sure.max()),
                "confidence": float(expit(sure).mean()),
                "accuracy": mean_interval(hit_P[part], pairs.cluster_P[part], True, resamples=resamples, seed=seed),
            }
        )
    return rows


def _by_category(
    hit_P: Floats, difference_P: Floats, pairs: Pairs, resamples: int, seed: int
) -> dict[str, dict[str, Interval]]:
    counts = Counter(category for category in pairs.category_P if category is not None)
    category_P = np.array(["" if category is None else category for category in pairs.category_P], object)
    of: dict[str, dict[str, Interval]] = {}
    for category, _ in counts.most_common():
        here = category_P == category
        columns = {"accuracy": hit_P, "longer_wins": wins(difference_P), "shorter_wins": wins(-difference_P)}
        of[category] = {
            name: mean_interval(values[here], pairs.cluster_P[here], True, resamples=resamples, seed=seed)
            for name, values in columns.items()
        }
    return of


def _calibration(margin_P: Floats, pairs: Pairs, seed: int) -> dict[str, Any]:
    """Whether sigmoid(margin) is the share of annotators who prefer the answer that the model prefers."""
    confidence_P = expit(np.abs(margin_P))
    # Equal scores prefer neither: one half of the annotators is with the model.
    outcome_P = np.where(margin_P == 0, 0.5, np.where(margin_P > 0, pairs.share_P, 1 - pairs.share_P))
    brier_P = brier_score(expit(margin_P), pairs.share_P)
    logits_P2 = np.stack([margin_P, np.zeros_like(margin_P)], 1)
    target_P2 = np.stack([pairs.share_P, 1 - pairs.share_P], 1)

    def ece(bins: int) -> Interval:
        # Confidences begin at one half: twice the bins over [0, 1] are so many over [0.5, 1].
        return statistic_interval(
            lambda i: calibration_error(confidence_P[i], outcome_P[i], 2 * bins), pairs.cluster_P, seed=seed
        )

    return {
        "ece_10": ece(10),
        "ece_15": ece(15),
        "brier": mean_interval(brier_P, pairs.cluster_P, seed=seed),
        "brier_of_no_opinion": float(brier_score(np.full_like(pairs.share_P, 0.5), pairs.share_P).mean()),
        "nll": float(-(target_P2 * -np.logaddexp(0, -np.stack([margin_P, -margin_P], 1))).sum(1).mean()),
        "temperature": best_temperature(logits_P2, target_P2),
        "reliability": reliability(confidence_P, outcome_P, 20),
        "outcome": "share of annotators" if pairs.several else "one label a pair",
    }


def _length(comparisons: Sequence[Comparison], scores: Sequence[Sequence[float]], seed: int) -> dict[str, Interval]:
    rows = [
        (score, words(text), one.group)
        for one, of in zip(comparisons, scores, strict=True)
        for score, text in zip(of, one.texts, strict=True)
        if np.isfinite(score)
    ]
    score_N, length_N, group_N = zip(*rows, strict=True)
    return length_correlation(score_N, length_N, group_N, resamples=200, seed=seed)


def _best_of(
    comparisons: Sequence[Comparison], scores: Sequence[Sequence[float]], resamples: int, seed: int
) -> list[dict[str, Any]]:
    """What the model's choice among n answers to a prompt gains over a choice by chance, in the judgement's unit."""
    complete = [n for n, of in enumerate(scores) if np.isfinite(of).all()]
    graded = all(comparisons[n].grades for n in complete)
    rows = []
    most = max((len(scores[n]) for n in complete), default=0)
    for n in sorted({*(2**k for k in range(1, most.bit_length())), most} - {0, 1}):
        gains: list[float] = []
        ideal: list[float] = []
        groups: list[str] = []
        for number in complete:
            if len(scores[number]) < n:
                continue
            one = comparisons[number]
            quality = np.array(one.grades if graded else _beaten(one.ranks))[None]
            by_chance = quality.mean()
            gains.append(best_of_n(np.array(scores[number])[None], quality, n)[0] - by_chance)
            ideal.append(best_of_n(quality, quality, n)[0] - by_chance)
            groups.append(one.group)
        interval = mean_interval(gains, groups, resamples=resamples, seed=seed)
        unit = "grade" if graded else "share of other answers beaten"
        rows.append({"n": n, "gain": interval, "gain_of_the_judge": float(np.mean(ideal)), "unit": unit})
    return rows


def _beaten(ranks: Sequence[float]) -> list[float]:
    """Share of the other answers that are worse, a tie counting half."""
    r = np.asarray(ranks)
    return list((wins(r[None] - r[:, None]).sum(1) - 0.5) / (len(r) - 1))
