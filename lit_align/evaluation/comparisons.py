"""Judged answers of any preference source, and what one or several reward models give each of them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lit_align.data.instruction import group_of
from lit_align.data.rows import Row, Tally
from lit_align.data.source import Source
from lit_align.evaluation.length import words

Floats = NDArray[np.float64]


class Comparison(NamedTuple):
    """A prompt with answers that were judged.

    Attributes:
        prompt: text or messages.
        texts: the K answers, as text.
        answers: the same as the source has them: text or messages.
        ranks: lower is better.
        finished: whether an answer ended by itself.
        shares: share of annotators who prefer the first of each two answers, in the order 12, 13, ... 23; or none.
        grades: what the annotator gives each answer; or none.
        category: of the prompt, or None.
        group: a hash of the prompt: what a bootstrap resamples together.
        tools: beside the conversation, or None.
    """

    prompt: Any
    texts: list[str]
    answers: list[Any]
    ranks: list[float]
    finished: list[bool]
    shares: list[float]
    grades: list[float]
    category: str | None
    group: str
    tools: Any = None


def read_comparisons(source: Source, tally: Tally, category: str | None = None) -> list[Comparison]:
    """Every row that holds at least two judged answers; the others are counted in `tally`, and the first is named.

    Args:
        source: where rows come from.
        tally: counts `rows`, `skipped` and `without_two_answers`.
        category: column that names the category of a row.

    Raises:
        ValueError: no row can be used; says why the first could not.
    """
    found = []
    for where, row in source.read("skip", tally, keep=[category] if category else []):
        if len(row.get("completions") or ()) < 2 or "ranks" not in row:
            tally["without_two_answers"] += 1
            tally.first_skipped = tally.first_skipped or f"{where}: has no two judged answers"
            continue
        found.append(_comparison(row, category))
    if not found:
        raise ValueError(
            f"{source.name} holds no comparison: expected chosen and rejected, or completions and ranks "
            f"({tally['rows']} rows read; {tally.first_skipped or 'none was bad'})"
        )
    return found


def _comparison(row: Row, category: str | None) -> Comparison:
    answers = list(row["completions"])
    return Comparison(
        row["prompt"],
        [as_text(answer) for answer in answers],
        answers,
        [float(rank) for rank in row["ranks"]],
        list(row.get("finished") or [True] * len(answers)),
        list(row.get("shares") or []),
        list(row.get("scores") or []),
        None if category is None else str(row[category]),
        group_of(row["prompt"]),
        row.get("tools"),
    )


def as_text(answer: Any) -> str:
    """The words of an answer: text, the content of a message, or the text parts of it."""
    content = answer.get("content") if isinstance(answer, dict) else answer
    if isinstance(content, list):
        return " ".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    return content or ""


class Pairs(NamedTuple):
    """All pairs of which one answer is judged better, as columns of length P.

    Attributes:
        comparison_P, better_P, worse_P: which comparison, and which of its answers.
        cluster_P: number of the prompt.
        better_words_P, worse_words_P: lengths.
        share_P: share of annotators who prefer the better one; 1 where the source has one verdict.
        category_P: category, or None.
        ties: pairs that are judged equal, which no accuracy counts.
        several: whether shares of several annotators are known.
    """

    comparison_P: NDArray[np.int64]
    better_P: NDArray[np.int64]
    worse_P: NDArray[np.int64]
    cluster_P: NDArray[np.int64]
    better_words_P: Floats
    worse_words_P: Floats
    share_P: Floats
    category_P: list[str | None]
    ties: int
    several: bool


def pairs_of(comparisons: Sequence[Comparison]) -> Pairs:
    """Every two answers to a prompt that are judged differently; where annotators' shares are known, by these."""
    rows: list[tuple[int, int, int, float]] = []
    ties = 0
    numbers: dict[str, int] = {}
    for number, one in enumerate(comparisons):
        numbers.setdefault(one.group, len(numbers))
        shares = one.shares or [np.nan] * (len(one.ranks) * (len(one.ranks) - 1) // 2)
        for (i, j), share in zip(combinations(range(len(one.ranks)), 2), shares, strict=True):
            told = not np.isnan(share)
            lead = share - 0.5 if told else one.ranks[j] - one.ranks[i]
            if lead == 0:
                ties += 1
                continue
            better, worse = (i, j) if lead > 0 else (j, i)
            rows.append((number, better, worse, max(share, 1 - share) if told else 1.0))
    lengths = [[words(text) for text in one.texts] for one in comparisons]
    return Pairs(
        np.array([row[0] for row in rows], np.int64),
        np.array([row[1] for row in rows], np.int64),
        np.array([row[2] for row in rows], np.int64),
        np.array([numbers[comparisons[row[0]].group] for row in rows], np.int64),
        np.array([lengths[number][better] for number, better, _, _ in rows], np.float64),
        np.array([lengths[number][worse] for number, _, worse, _ in rows], np.float64),
        np.array([row[3] for row in rows], np.float64),
        [comparisons[row[0]].category for row in rows],
        ties,
        any(one.shares for one in comparisons),
    )


def margins(pairs: Pairs, scores: Sequence[Sequence[float]]) -> Floats:
    """Score of the better answer less that of the worse; NaN where one is no number. Shape (P,)."""
    columns = zip(pairs.comparison_P, pairs.better_P, pairs.worse_P, strict=True)
    with np.errstate(invalid="ignore"):
        found = np.array([scores[n][better] - scores[n][worse] for n, better, worse in columns], np.float64)
    return np.where(np.isfinite(found), found, np.nan)
