"""Diversity of answers: to one prompt, and across prompts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

from lit_align.evaluation.intervals import Interval, mean_interval

Gram = tuple[str, ...]


def grams(text: str, n: int, window: int | None = None) -> list[Gram]:
    """Runs of n words, of the first `window` words."""
    told = text.lower().split()[:window]
    return [tuple(told[i : i + n]) for i in range(len(told) - n + 1)]


def distinct(texts: Sequence[str], n: int = 2, window: int | None = None) -> float:
    """Different n-grams among all n-grams of some texts; NaN if there are none.

    Longer texts repeat themselves more: compare policies of different length with a `window` of words.

    Source: Li et al. 2016, "A Diversity-Promoting Objective Function for Neural Conversation Models", section 5.
    """
    every = [gram for text in texts for gram in grams(text, n, window)]
    return len(set(every)) / len(every) if every else np.nan


def overlap(texts: Sequence[str], n: int = 2, window: int | None = None) -> list[float]:
    """For each text the share of its n-grams that some other of the texts has, too; NaN for one without n-grams."""
    counts = [Counter(grams(text, n, window)) for text in texts]
    holders: Counter[Gram] = Counter(gram for count in counts for gram in count)
    shares = []
    for count in counts:
        total = sum(count.values())
        shared = sum(number for gram, number in count.items() if holders[gram] > 1)
        shares.append(shared / total if total else np.nan)
    return shares


def diversity(
    answers: Sequence[str],
    prompts: Sequence[Hashable],
    n: int = 2,
    window: int | None = 32,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """Diversity per prompt (of several answers to it) and across prompts (of the first answer to each).

    Args:
        answers: texts; several to each prompt, or one.
        prompts: prompt of each answer.
        n: words of a gram.
        window: words of an answer that count; None for all.
        resamples: of the bootstrap over prompts.
        seed: of the resampling.

    Returns:
        `distinct_per_prompt`, `overlap_per_prompt`, `same_per_prompt` (share of answers that repeat another word for
        word), each over prompts with several answers; `distinct_across`, a number; `overlap_across`;
        `answers_without_grams`, which say nothing of either.

    Source: the two levels are those of Kirk et al. 2023, "Understanding the Effects of RLHF on LLM Generalisation and
    Diversity", section 4.
    """
    by_prompt: dict[Hashable, list[str]] = {}
    for answer, prompt in zip(answers, prompts, strict=True):
        by_prompt.setdefault(prompt, []).append(answer)
    several = [texts for texts in by_prompt.values() if len(texts) > 1]
    firsts = [texts[0] for texts in by_prompt.values()]

    def interval(values: Sequence[float]) -> Interval:
        known = [value for value in values if not np.isnan(value)]
        return mean_interval(known, range(len(known)), share=True, resamples=resamples, seed=seed)

    def repeated(texts: Sequence[str]) -> float:
        counts = Counter(" ".join(text.split()) for text in texts)
        return sum(number for number in counts.values() if number > 1) / len(texts)

    def mean(values: Sequence[float]) -> float:
        known = [value for value in values if not np.isnan(value)]
        return float(np.mean(known)) if known else np.nan

    return {
        "distinct_per_prompt": interval([distinct(texts, n, window) for texts in several]),
        "overlap_per_prompt": interval([mean(overlap(texts, n, window)) for texts in several]),
        "same_per_prompt": interval([repeated(texts) for texts in several]),
        "distinct_across": distinct(firsts, n, window),
        "overlap_across": interval(overlap(firsts, n, window)),
        "answers_without_grams": sum(not grams(answer, n) for answer in answers),
    }
