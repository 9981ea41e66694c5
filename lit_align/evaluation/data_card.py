"""The card of a data set: lengths, format, refusals, duplicates, what preferences like, how annotators agree."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np

from lit_align.data.rows import Row
from lit_align.evaluation.comparisons import as_text
from lit_align.evaluation.intervals import Interval, mean_interval
from lit_align.evaluation.length import words
from lit_align.evaluation.refusal import classify

_LIST = re.compile(r"^\s*(?:[-*•]|\d+[.)])\s+\S", re.MULTILINE)
_CODE = re.compile(r"```|^(?:def |class |import |from \w+ import |#include|public |function |SELECT )", re.MULTILINE)
_REFERENCE = re.compile(r"https?://|www\.\w|\[\d+\]|\(\w+(?: et al\.)?,? \d{4}\)")


class Told(NamedTuple):
    """A row as the card counts it: what was asked, what was answered, which of two answers is better.

    Attributes:
        prompt: all turns before the answer, as text; empty for plain text.
        answers: those that are demonstrated or judged; the text of a document.
        ranks: of judged answers, lower is better; empty for demonstrations.
        shares: of annotators, if known; see `data/rows.py`.
        label: whether a single judged answer is good; None for others.
    """

    prompt: str
    answers: list[str]
    ranks: list[float]
    shares: list[float]
    label: bool | None = None


def as_told(row: Row) -> Told:
    """A row of the one schema."""
    if "messages" in row:
        *before, last = row["messages"]
        return Told(_said(before), [as_text(last)], [], [])
    if "text" in row:
        return Told("", [row["text"]], [], [])
    prompt = row["prompt"] if isinstance(row["prompt"], str) else _said(row["prompt"])
    if "completions" in row:
        answers = [as_text(answer) for answer in row["completions"]]
        label = bool(row["label"]) if "label" in row else None
        return Told(prompt, answers, list(row.get("ranks") or []), list(row.get("shares") or []), label)
    answer = row.get("completion", row.get("reference", row.get("answer")))
    return Told(prompt, [] if answer is None else [as_text(answer)], [], [])


def _said(messages: Sequence[Row]) -> str:
    return "\n".join(as_text(message) for message in messages)


def data_card(rows: Sequence[Told], resamples: int = 1000, seed: int = 0) -> dict[str, Any]:
    """What a set holds. Shares of answers are clustered by prompt.

    Args:
        rows: of the set.
        resamples: of the bootstrap over prompts.
        seed: of the resampling.

    Returns:
        Counts; lengths in words; shares of answers with lists, code, references, refusals; duplicates; of preferences
        `longer_preferred` with its interval, `ties`, `identical_answers`, `answers_per_prompt`, `better_comes_first`
        (the position of the better answer, which a model could learn), and the agreement of annotators where their
        shares are known: `annotators_agree`, two drawn by chance, and `annotator_with_majority`.
    """
    prompts = [plain_text(row.prompt) for row in rows]
    answers = [(answer, prompt) for row, prompt in zip(rows, prompts, strict=True) for answer in row.answers]
    clusters = [prompt for _, prompt in answers]
    verdicts = [classify(answer) for answer, _ in answers]

    def share(values: Sequence[bool | float], groups: Sequence[Any]) -> Interval:
        return mean_interval(np.asarray(values, np.float64), groups, share=True, resamples=resamples, seed=seed)

    def answered(pattern: re.Pattern[str]) -> Interval:
        return share([bool(pattern.search(answer)) for answer, _ in answers], clusters)

    whole = Counter((prompt, *map(plain_text, row.answers)) for prompt, row in zip(prompts, rows, strict=True))
    labels = [row.label for row in rows if row.label is not None]
    card: dict[str, Any] = {
        "rows": len(rows),
        "answers": len(answers),
        "different_prompts": len(set(prompts)),
        "prompt_words": _lengths([row.prompt for row in rows if row.prompt]),
        "answer_words": _lengths([answer for answer, _ in answers]),
        "empty_answers": sum(not answer.strip() for answer, _ in answers),
        "repeated_rows": sum(count - 1 for count in whole.values()),
        "lists": answered(_LIST),
        "code": answered(_CODE),
        "references": answered(_REFERENCE),
        "refusals": share([verdict in ("refusal", "partial") for verdict in verdicts], clusters),
        "good_labels": share(labels, range(len(labels))) if labels else None,
    }
    return card | (_preferences(rows, prompts, share) if any(len(row.ranks) > 1 for row in rows) else {})


def _preferences(rows: Sequence[Told], prompts: Sequence[str], share: Any) -> dict[str, Any]:
    longer: list[float] = []
    first: list[float] = []
    groups: list[str] = []
    ties = same = 0
    agree: list[float] = []
    majority: list[float] = []
    judged: list[str] = []
    for row, prompt in zip(rows, prompts, strict=True):
        shares = row.shares or [np.nan] * (len(row.ranks) * (len(row.ranks) - 1) // 2)
        for (i, j), part in zip(combinations(range(len(row.ranks)), 2), shares, strict=True):
            same += row.answers[i].strip() == row.answers[j].strip()
            if not np.isnan(part):
                agree.append(part**2 + (1 - part) ** 2)
                majority.append(max(part, 1 - part))
                judged.append(prompt)
            lead = row.ranks[j] - row.ranks[i] if np.isnan(part) else part - 0.5
            if lead == 0:
                ties += 1
                continue
            difference = (words(row.answers[i]) - words(row.answers[j])) * np.sign(lead)
            longer.append(float(np.sign(difference) + 1) / 2)
            first.append(float(lead > 0))
            groups.append(prompt)
    return {
        "pairs": len(longer) + ties,
        "ties": ties,
        "identical_answers": same,
        "answers_per_prompt": float(np.mean([len(row.ranks) for row in rows])),
        "longer_preferred": share(longer, groups),
        "better_comes_first": share(first, groups),
        "annotators_agree": share(agree, judged) if agree else None,
        "annotator_with_majority": share(majority, judged) if agree else None,
    }


def overlaps(sets: Sequence[Sequence[Told]]) -> list[list[float]]:
    """Share of the rows of each set (row) whose prompt another set (column) holds, too.

    Text without a prompt is compared as a whole. Case, punctuation and white space do not count. The diagonal is the
    share of rows whose prompt comes again in the same set.
    """
    keys = [[plain_text(row.prompt or " ".join(row.answers)) for row in rows] for rows in sets]
    counts = [Counter(of) for of in keys]
    return [
        [
            float(np.mean([counts[other][key] > (one == other) for key in of])) if of else np.nan
            for other in range(len(sets))
        ]
        for one, of in enumerate(keys)
    ]


def plain_text(text: str) -> str:
    """Letters and digits in lower case, single blanks between them."""
    return " ".join(re.findall(r"\w+", text.lower()))


def _lengths(texts: Sequence[str]) -> dict[str, float]:
    if not texts:
        return {"mean": np.nan, "median": np.nan, "p95": np.nan, "longest": np.nan}
    counts = np.array([words(text) for text in texts])
    quantiles = {"median": float(np.median(counts)), "p95": float(np.quantile(counts, 0.95))}
    return {"mean": float(counts.mean()), **quantiles, "longest": float(counts.max())}
