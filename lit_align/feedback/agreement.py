"""Whether labels can be trusted: agreement, biases and reliability of annotators, as one tree of figures."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from statistics import median
from typing import Any

import numpy as np

from lit_align.feedback.bias import biases
from lit_align.feedback.consensus import consensus
from lit_align.feedback.labels import Label, control_score
from lit_align.feedback.statistics import (
    Interval,
    by_cluster,
    clustered,
    cohen_kappa,
    every_two,
    fleiss_kappa,
    krippendorff_alpha,
    pairwise_agreement,
)
from lit_align.feedback.truth import plackett_luce
from lit_align.feedback.units import Ratings, criterion_ratings, one_per_annotator, pair_ratings


def agreement(labels: Sequence[Label], resamples: int = 1000) -> dict[str, Any]:
    """Figures of a label set; every interval is of 95 % and resamples tasks.

    Controls are left out of everything but each annotator's share of controls passed.

    Args:
        labels: of one or several annotators; of the same task by the same annotator the last counts.
        resamples: of the bootstrap.

    Raises:
        ValueError: there are only controls, or two tasks have one name.
    """
    held, replaced = one_per_annotator(labels)
    controls, counted = [x for x in held if x.control], [x for x in held if not x.control]
    if not counted:
        raise ValueError("no labels but those of controls: there is no agreement to measure")
    ratings = pair_ratings(counted)
    criteria = sorted({name for label in counted for name in label.criteria})
    strong = any(label.strength is not None for label in counted)
    return {
        "labels": len(counted),
        "replaced": replaced,
        "controls": len(controls),
        "tasks": len({label.task for label in counted}),
        "pairs": len(ratings.units),
        "pairs_judged_by_several": int(((~np.isnan(ratings.ratings_UA)).sum(1) > 1).sum()),
        "guidelines": sorted({label.guideline for label in counted if label.guideline}),
        "overall": _overall(ratings, strong, resamples),
        "categories": _categories(ratings, resamples),
        "criteria": {name: _criterion(criterion_ratings(counted, name), resamples) for name in criteria},
        "two_by_two": _two_by_two(ratings, resamples),
        "annotators": _annotators(ratings, counted, controls, resamples),
        "sources": source_strengths(counted),
    }


def _overall(ratings: Ratings, strong: bool, resamples: int) -> dict[str, Interval]:
    signs, clusters = ratings.signs(), ratings.cluster_U
    figures = {
        "agreement": pairwise_agreement(signs, clusters, resamples),
        "alpha_nominal": krippendorff_alpha(signs, "nominal", clusters, resamples),
        "alpha_ordinal": krippendorff_alpha(signs, "ordinal", clusters, resamples),
        "fleiss_kappa": fleiss_kappa(signs, clusters, resamples),
    }
    if strong:
        figures["alpha_ordinal_strength"] = krippendorff_alpha(ratings.ratings_UA, "ordinal", clusters, resamples)
    return figures


def _categories(ratings: Ratings, resamples: int) -> dict[str, dict[str, Any]]:
    figures = {}
    for name in sorted(set(ratings.category_U.tolist()) - {""}):
        part = ratings.of(ratings.category_U == name)
        figures[name] = {
            "pairs": len(part.units),
            "agreement": pairwise_agreement(part.signs(), part.cluster_U, resamples),
            "alpha_nominal": krippendorff_alpha(part.signs(), "nominal", part.cluster_U, resamples),
        }
    return figures


def _criterion(ratings: Ratings, resamples: int) -> dict[str, Any]:
    return {
        "scores": int((~np.isnan(ratings.ratings_UA)).sum()),
        "agreement": pairwise_agreement(ratings.ratings_UA, ratings.cluster_U, resamples),
        "alpha_ordinal": krippendorff_alpha(ratings.ratings_UA, "ordinal", ratings.cluster_U, resamples),
    }


def _two_by_two(ratings: Ratings, resamples: int) -> list[dict[str, Any]]:
    """Cohen's kappa of each two annotators that share a unit."""
    signs, figures = ratings.signs(), []
    for a, b in every_two(len(ratings.annotators)):
        shared = int((~np.isnan(signs[:, a]) & ~np.isnan(signs[:, b])).sum())
        if shared:
            kappa = cohen_kappa(signs[:, a], signs[:, b], "none", ratings.cluster_U, resamples)
            linear = cohen_kappa(signs[:, a], signs[:, b], "linear", ratings.cluster_U, 0).value
            names = {"first": ratings.annotators[a], "second": ratings.annotators[b]}
            figures.append({**names, "pairs": shared, "kappa": kappa, "kappa_linear": linear})
    return figures


def _annotators(
    ratings: Ratings, labels: list[Label], controls: list[Label], resamples: int
) -> dict[str, dict[str, Any]]:
    signs, drawn, reached = ratings.signs(), biases(labels, resamples), consensus(ratings)
    mine: dict[str, list[Label]] = defaultdict(list)
    tested: dict[str, list[Label]] = defaultdict(list)
    for label in labels:
        mine[label.annotator].append(label)
    for label in controls:
        tested[label.annotator].append(label)
    figures = {}
    for a, name in enumerate(ratings.annotators):
        own, others = signs[:, a], np.delete(signs, a, axis=1)
        rated = ~np.isnan(own)
        parts = np.stack([(others == own[:, None]).sum(1), (~np.isnan(others)).sum(1)], 1)[rated].astype(float)
        _, clusters = np.unique(ratings.cluster_U[rated], return_inverse=True)
        seconds = [label.seconds for label in mine[name] if label.seconds is not None]
        figures[name] = {
            "labels": len(mine[name]),
            "agreement_with_others": clustered(
                lambda sums: sums[0] / sums[1] if sums[1] else np.nan, by_cluster(parts, clusters), resamples
            ),
            "accuracy": reached.accuracy[name],
            "weight": reached.weight[name],
            "ties": float((own[rated] == 0).mean()),
            "median_seconds": median(seconds) if seconds else None,
            "controls": len(tested[name]),
            "controls_passed": _passed(tested[name]),
            "biases": drawn[name],
        }
    return figures


def _passed(controls: list[Label]) -> float | None:
    """Mean share of pairs of controls that are as expected."""
    scores = [score for score in map(control_score, controls) if score is not None]
    return sum(scores) / len(scores) if scores else None


def source_strengths(labels: Sequence[Label]) -> dict[str, float]:
    """Plackett-Luce log-strengths of the sources that completions name, unblinded; empty where there are none.

    A completion that several sources wrote, and one that ties with another, is left out of its ranking.
    """
    rankings = []
    for label in labels:
        named = [sorted({str(copy.get("source")) for copy in of}) for of in label.sources or [] if isinstance(of, list)]
        if len(named) < len(label.completions):
            continue
        places: dict[str, float] = {}
        for k, names in enumerate(named):
            if len(names) == 1 and label.ranks.count(label.ranks[k]) == 1:
                places.setdefault(names[0], label.ranks[k])  # of a source with several completions the first
        if len(places) > 1:
            rankings.append(sorted(places, key=lambda name: places[name]))
    sources = sorted({name for ranking in rankings for name in ranking})
    number = {name: n for n, name in enumerate(sources)}
    try:
        strengths = plackett_luce([[number[name] for name in ranking] for ranking in rankings], len(sources))
    except ValueError:  # one always comes first, or last
        return {}
    return dict(zip(sources, map(float, strengths), strict=True)) if rankings else {}


def plain(value: Any) -> Any:
    """Figures as JSON holds them: intervals as value, low, high; NaN as null."""
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return plain(value._asdict())
    if isinstance(value, dict):
        return {key: plain(held) for key, held in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(held) for held in value]
    if isinstance(value, (float, np.floating)):
        return None if np.isnan(value) else float(value)
    return value
