"""What a model knows of a set of questions before it is trained on them, and what to do with what it does not know."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lit_align.evaluation.intervals import mean_interval

Category = Literal["HighlyKnown", "MaybeKnown", "WeaklyKnown", "Unknown"]
CATEGORIES: tuple[Category, ...] = ("HighlyKnown", "MaybeKnown", "WeaklyKnown", "Unknown")
_IGNORANT = re.compile(
    r"\bi (?:do not|don'?t|did not|didn'?t) know\b|\bi(?:'m| am) not (?:sure|certain|aware)\b|\bno idea\b|"
    r"\bi (?:can(?:no|')?t|cannot) (?:say|tell|answer)\b|\b(?:is|it's|that's) (?:not known|unknown)(?: to me)?\b|"
    r"\bi have no (?:information|knowledge|idea)\b",
    re.IGNORECASE,
)


def normalized(text: str) -> str:
    """Lower case, without articles, punctuation and more than one blank.

    Source: Rajpurkar et al. 2016, "SQuAD", section 6.1.
    """
    plain = "".join(" " if c in string.punctuation else c for c in text.lower())
    return " ".join(word for word in plain.split() if word not in ("a", "an", "the"))


def right(answer: str, references: Sequence[str]) -> bool:
    """Whether an answer is, or begins with, one of the references, both normalised; its first line counts."""
    said = normalized(answer.strip().split("\n")[0])
    return any(ref and (said == ref or said.startswith(f"{ref} ")) for ref in map(normalized, references))


def admits_ignorance(answer: str) -> bool:
    """Whether an answer says that it does not know."""
    return bool(_IGNORANT.search(answer.replace("’", "'")))  # noqa: RUF001


def category(greedy: ArrayLike, sampled: ArrayLike) -> Category:
    """Class of one question by repeated answers of the model, each 1 if right.

    Args:
        greedy: most probable answers, one for each few-shot prompt. Any shape.
        sampled: sampled answers, of all few-shot prompts. Any shape.

    Returns:
        HighlyKnown: always right without sampling. MaybeKnown: at times. WeaklyKnown: only when sampling. Unknown:
        never.

    Raises:
        ValueError: no greedy answer.

    Source: Gekhman et al. 2024, "Does Fine-Tuning LLMs on New Knowledge Encourage Hallucinations?", table 1 of
    section 3 (10 prompts of 4 examples, 16 samples at temperature 0.5).
    """
    greedy_share, sampled_hits = np.asarray(greedy, np.float64), np.asarray(sampled, np.float64)
    if not greedy_share.size:
        raise ValueError("a question needs at least one greedy answer to be classified")
    share = greedy_share.mean()
    if share == 1:
        return "HighlyKnown"
    if share > 0:
        return "MaybeKnown"
    return "WeaklyKnown" if sampled_hits.any() else "Unknown"


def summary(categories: Sequence[Category]) -> dict[str, float]:
    """Share of questions in each class."""
    counts = Counter(categories)
    return {name: counts[name] / len(categories) if categories else np.nan for name in CATEGORIES}


def choose_rows(
    rows: Sequence[dict[str, Any]],
    categories: Sequence[Category],
    unknown: Literal["keep", "drop", "relabel"] = "keep",
    answer: str = "I do not know.",
) -> list[dict[str, Any]]:
    """The rows of an instruction set, with those that the model does not know kept, dropped, or relabelled.

    Args:
        rows: in the one schema, with `completion`.
        categories: of each row.
        unknown: what becomes of rows of class Unknown.
        answer: what relabelled rows answer.

    Raises:
        ValueError: another number of classes than of rows; an unknown choice.

    Source: Gekhman et al. 2024, sections 4 and 6.
    """
    if len(rows) != len(categories):
        raise ValueError(f"{len(rows)} rows have {len(categories)} classes: expected one for each")
    if unknown not in ("keep", "drop", "relabel"):
        raise ValueError(f"unknown must be keep, drop or relabel, got {unknown!r}")
    chosen = []
    for row, of in zip(rows, categories, strict=True):
        if of != "Unknown" or unknown == "keep":
            chosen.append(dict(row))
        elif unknown == "relabel":
            chosen.append({**row, "completion": answer})
    return chosen


def hallucination(
    answers: Sequence[str],
    references: Sequence[Sequence[str]],
    known: NDArray[np.bool_] | Sequence[bool],
    confidence: ArrayLike | None = None,
    sure: float = 0.5,
    seed: int = 0,
) -> dict[str, Any]:
    """Right, wrong and withheld answers, on questions that the model knew before and on those that it did not.

    Args:
        answers: the model's.
        references: right answers to each question.
        known: whether the model knew it before training.
        confidence: of each answer, in [0, 1]; None leaves `confident_wrong` out.
        sure: confidence from which a wrong answer counts as a confident one.
        seed: of the resampling.
    """
    hit = np.array([right(a, refs) for a, refs in zip(answers, references, strict=True)], bool)
    withheld = np.array([admits_ignorance(answer) for answer in answers], bool) & ~hit
    known_N = np.asarray(known, bool)
    told: dict[str, Any] = {}
    for name, here in (("known", known_N), ("unknown", ~known_N)):
        columns = {"right": hit, "does_not_know": withheld, "wrong": ~hit & ~withheld}
        if confidence is not None:
            columns["confident_wrong"] = columns["wrong"] & (np.asarray(confidence, np.float64) >= sure)
        told[name] = {
            column: mean_interval(values[here].astype(float), np.flatnonzero(here), share=True, seed=seed)
            for column, values in columns.items()
        }
    return told
