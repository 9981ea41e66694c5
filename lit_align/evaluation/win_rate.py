"""Win rate of one policy's answers over another's: both orders, ties, and the judge's own biases beside it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lit_align.evaluation.intervals import Interval, mean_interval
from lit_align.evaluation.length import length_controlled_win_rate, words

Floats = NDArray[np.float64]
# Prompts, answers shown first, answers shown second -> 1 where the first is better, 0 the second, 0.5 a tie, None
# where the judge did not decide.
Judge = Callable[[Sequence[Any], Sequence[str], Sequence[str]], Sequence[float | None]]


def by_score(score: Callable[[Sequence[Any], Sequence[str]], Sequence[float]], margin: float = 0.0) -> Judge:
    """A judge that prefers the higher score.

    Args:
        score: a number for each prompt and answer: a reward model, gold, a function. NaN decides nothing.
        margin: a difference up to which answers tie.
    """

    def judge(prompts: Sequence[Any], first: Sequence[str], second: Sequence[str]) -> list[float | None]:
        gap = np.asarray(score(prompts, first), np.float64) - np.asarray(score(prompts, second), np.float64)
        return [None if np.isnan(g) else 0.5 if abs(g) <= margin else float(g > 0) for g in gap]

    return judge


def order_only(prompts: Sequence[Any], first: Sequence[str], second: Sequence[str]) -> list[float | None]:
    """A planted judge that prefers what it is shown first."""
    return [1.0] * len(first)


def length_only(prompts: Sequence[Any], first: Sequence[str], second: Sequence[str]) -> list[float | None]:
    """A planted judge that prefers the answer of more words."""
    return [float((np.sign(words(a) - words(b)) + 1) / 2) for a, b in zip(first, second, strict=True)]


PLANTED: dict[str, Judge] = {"order_only": order_only, "length_only": length_only}


def win_rate(
    prompts: Sequence[Any],
    ours: Sequence[str],
    theirs: Sequence[str],
    judge: Judge,
    clusters: Sequence[Hashable] | None = None,
    resamples: int = 2000,
    seed: int = 0,
) -> dict[str, Any]:
    """How often our answer beats theirs, a tie counting one half.

    Each pair is judged in both orders. A verdict counts if both orders agree; if they do not, the pair is a tie. A pair
    that one order leaves undecided is left out and counted; `if_undecided_lose` and `if_undecided_win` bound the rate.

    Args:
        prompts: of each pair.
        ours: answers of the first policy.
        theirs: answers of the second.
        judge: see `Judge`.
        clusters: what a bootstrap resamples together; the prompts' texts if None.
        resamples: of the bootstrap.
        seed: of the resampling.

    Returns:
        `win_rate` and the shares `wins`, `ties`, `losses`; `flips`, the share of decisive verdicts that the other order
        reverses; `first_shown_wins` and `longer_wins` of all decisive verdicts, which are about 0.5 for a judge without
        these biases; `longer_is_ours`, the share of pairs whose longer answer is ours; `length_controlled`;
        `undecided` with the first prompts of them; `empty_answers`.

    Raises:
        ValueError: columns of different lengths, or a verdict that is none.

    Source: both orders: Zheng et al. 2023, "Judging LLM-as-a-Judge with MT-Bench and Chatbot Arena", section 3.4.
    """
    if not len(prompts) == len(ours) == len(theirs):
        raise ValueError(f"{len(prompts)} prompts for {len(ours)} and {len(theirs)} answers: expected as many")
    groups = np.array([str(one) for one in (prompts if clusters is None else clusters)], object)
    forward = _verdicts(judge(prompts, ours, theirs), len(prompts))
    shown_second = _verdicts(judge(prompts, theirs, ours), len(prompts))
    backward = 1 - shown_second
    decided = ~(np.isnan(forward) | np.isnan(backward))
    outcome = np.where(forward == backward, forward, 0.5)[decided]
    longer = np.array([np.sign(words(a) - words(b)) for a, b in zip(ours, theirs, strict=True)], np.float64)

    def share(values: Floats, of: NDArray[Any]) -> Interval:
        return mean_interval(values, of, share=True, resamples=resamples, seed=seed)

    # Both orders of each pair are verdicts; those that decide something show a bias.
    first = np.concatenate([forward, shown_second])
    sign = np.concatenate([longer, -longer])
    both = np.concatenate([groups, groups])
    decisive = (first == 0) | (first == 1)
    told = decisive & (sign != 0)
    opposed = decided & (forward != 0.5) & (backward != 0.5)
    open_pairs = np.flatnonzero(~decided)
    worst, best = (np.concatenate([outcome, np.full(len(open_pairs), end)]) for end in (0.0, 1.0))
    return {
        "pairs": len(prompts),
        "win_rate": share(outcome, groups[decided]),
        "wins": float((outcome == 1).mean()) if len(outcome) else np.nan,
        "ties": float((outcome == 0.5).mean()) if len(outcome) else np.nan,
        "losses": float((outcome == 0).mean()) if len(outcome) else np.nan,
        "flips": share((forward != backward)[opposed].astype(float), groups[opposed]),
        "first_shown_wins": share(first[decisive], both[decisive]),
        "longer_wins": share((first[told] == (sign[told] > 0)).astype(float), both[told]),
        "longer_is_ours": float(((longer + 1) / 2).mean()) if len(longer) else np.nan,
        "length_controlled": _length_controlled(outcome, ours, theirs, decided, groups, max(resamples // 5, 20), seed),
        "undecided": len(open_pairs),
        "undecided_prompts": [f"{prompts[i]!s:.100}" for i in open_pairs[:3]],
        "if_undecided_lose": float(worst.mean()) if len(worst) else np.nan,
        "if_undecided_win": float(best.mean()) if len(best) else np.nan,
        "empty_answers": sum(not text.strip() for text in (*ours, *theirs)),
    }


def planted_biases(
    prompts: Sequence[Any],
    ours: Sequence[str],
    theirs: Sequence[str],
    clusters: Sequence[Hashable] | None = None,
    resamples: int = 500,
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """The same statistics with judges whose bias is known, on the same answers: what a biased judge would look like.

    Raises:
        AssertionError: a statistic does not show the planted bias; the figures of a real judge would mean nothing.
    """
    told = {name: win_rate(prompts, ours, theirs, judge, clusters, resamples, seed) for name, judge in PLANTED.items()}
    order, length = told["order_only"], told["length_only"]
    compared = length["longer_wins"].observations
    known = [
        (order["first_shown_wins"].value, 1.0),
        (order["flips"].value, 1.0),
        (order["win_rate"].value, 0.5),
        (length["longer_wins"].value if compared else 1.0, 1.0),
        (length["win_rate"].value, length["longer_is_ours"]),
    ]
    if len(prompts) and any(abs(found - expected) > 1e-9 for found, expected in known):
        raise AssertionError(f"a planted bias does not show in the statistics: {known}")
    return told


def _verdicts(given: Sequence[float | None], expected: int) -> Floats:
    found = np.array([np.nan if verdict is None else float(verdict) for verdict in given], np.float64)
    if len(found) != expected or not (np.isnan(found) | np.isin(found, (0.0, 0.5, 1.0))).all():
        raise ValueError(f"the judge gave {list(given)!r:.80}, expected 1, 0, 0.5 or None for each of {expected} pairs")
    return found


def _length_controlled(
    outcome: Floats,
    ours: Sequence[str],
    theirs: Sequence[str],
    decided: NDArray[Any],
    groups: NDArray[Any],
    resamples: int,
    seed: int,
) -> Interval:
    difference = np.array([words(a) - words(b) for a, b in zip(ours, theirs, strict=True)], np.float64)
    if not len(outcome):
        return Interval(np.nan, np.nan, np.nan, 0, 0)
    return length_controlled_win_rate(outcome, difference[decided], groups[decided], resamples, seed)
