"""Labels from a model that judges: pairwise in both orders, or scored by criterion.

Pairwise, each two completions are shown in both orders (Zheng et al. 2023, "Judging LLM-as-a-Judge with MT-Bench and
Chatbot Arena", section 3.4): a judge that goes with the place contradicts itself, and the pair is a tie. Scored, each
completion gets a number under each criterion (Cui et al. 2023, UltraFeedback, section 3.3), and their means rank them.
Answers are parsed strictly; what does not parse is asked again, and then counted and left out.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lit_align.feedback.answerers import Answerer, Messages
from lit_align.feedback.labels import Label
from lit_align.feedback.statistics import Interval, clustered
from lit_align.feedback.tasks import Task, label_for

Mode = Literal["pairwise", "scored"]
ULTRAFEEDBACK = ("instruction following", "honesty", "truthfulness", "helpfulness")
ATTEMPTS = 3  # at an answer that parses
SCALE = 5

COMPARE = """\
Compare two answers to the conversation below.{principle}
Judge what they say. Do not judge their length, their order or their tone.
Give your reason in one or two sentences. Then write your verdict alone on the last line: [[A]] if answer A is better, \
[[B]] if answer B is better, [[C]] if they are equal.

<conversation>
{prompt}
</conversation>

<answer_A>
{first}
</answer_A>

<answer_B>
{second}
</answer_B>"""
SCORE = """\
Rate an answer to the conversation below by one criterion: {criterion}.
Give your reason in one or two sentences. Then write your rating alone on the last line, from [[1]] (worst) to \
[[{scale}]] (best).

<conversation>
{prompt}
</conversation>

<answer>
{answer}
</answer>"""


@dataclass
class Cache:
    """Answers by the content of the question, in a file with a line for each: a judge goes on where it stopped.

    Attributes:
        path: JSON lines; half a line that a killed process left is ignored.
        held: what it holds.
    """

    path: Path
    held: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        text = self.path.read_text() if self.path.exists() else ""
        for line in text.splitlines():
            try:
                row = json.loads(line)
                self.held[row["key"]] = row
            except (ValueError, KeyError, TypeError):
                continue
        if text and not text.endswith("\n"):
            with self.path.open("a") as file:
                file.write("\n")

    @staticmethod
    def key(name: str, messages: Messages, attempt: int) -> str:
        """Changes with the judge, the question and the attempt."""
        return hashlib.sha256(json.dumps([name, messages, attempt]).encode()).hexdigest()

    def keep(self, row: dict[str, Any]) -> None:
        """Add an answer, on disk before this returns."""
        self.held[row["key"]] = row
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())


@dataclass(frozen=True)
class Question:
    """One call: what is asked, of which completions (numbers in their task, in the order shown)."""

    task: Task
    shown: tuple[int, ...]
    criterion: str | None
    messages: Messages


def questions(
    task: Task, mode: Mode, criteria: Sequence[str] = ULTRAFEEDBACK, principle: str | None = None
) -> list[Question]:
    """The calls that a task needs: two for each pair, or one for each completion and criterion."""
    prompt = _written(task.prompt)

    def ask(text: str) -> Messages:
        return [{"role": "user", "content": text}]

    if mode == "scored":
        return [
            Question(
                task, (k,), criterion, ask(SCORE.format(criterion=criterion, scale=SCALE, prompt=prompt, answer=text))
            )
            for k, text in enumerate(task.completions)
            for criterion in criteria
        ]
    added = f" The one principle to judge by: {principle}" if principle else ""
    return [
        Question(task, (i, j), None, ask(COMPARE.format(principle=added, prompt=prompt, first=task.completions[i],
                                                        second=task.completions[j])))
        for one, other in itertools.combinations(range(len(task.completions)), 2)
        for i, j in ((one, other), (other, one))
    ]  # fmt: skip


def _written(prompt: Any) -> str:
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return "\n\n".join(f"{turn.get('role')}: {turn.get('content') or ''}" for turn in turns)


def verdict(text: str, kind: str) -> str | None:
    """What the last line of an answer says in double brackets, alone; None where it does not parse.

    Args:
        text: the answer.
        kind: the letters or digits that may stand there.
    """
    lines = [line for line in text.strip().splitlines() if line.strip()]
    found = re.fullmatch(rf"\s*\[\[([{kind}])\]\]\.?\s*", lines[-1]) if lines else None
    return found[1] if found else None


@dataclass
class Judged:
    """Labels of a judge, and what it took.

    Attributes:
        labels: one for each task that could be judged.
        counts: calls, answers from the cache, tokens, answers that did not parse, tasks left out.
        flips: share of pairs whose verdict followed the place and not the text; NaN where scored.
        first: share of decided verdicts that prefer the answer shown first.
    """

    labels: list[Label]
    counts: Counter[str]
    flips: Interval
    first: Interval


def estimate(asked: Sequence[Question], name: str, cache: Cache) -> dict[str, int]:
    """Calls that are not in the cache, and about how many tokens they ask: four characters to a token."""
    new = [q for q in asked if Cache.key(name, q.messages, 0) not in cache.held]
    size = sum(len(message["content"]) for q in new for message in q.messages)
    return {"calls": len(new), "cached": len(asked) - len(new), "tokens": size // 4}


def judge(
    tasks: Sequence[Task], answerer: Answerer, cache: Cache, mode: Mode = "pairwise",
    criteria: Sequence[str] = ULTRAFEEDBACK, principle: str | None = None, resamples: int = 1000,
) -> Judged:  # fmt: skip
    """Judge tasks, one after another; every answer is kept before the next question.

    Args:
        tasks: see `build_tasks`.
        answerer: who judges.
        cache: of its answers.
        mode: pairwise in both orders, or scored by criterion.
        criteria: of scored.
        principle: of pairwise: the one to judge by.
        resamples: of the intervals.
    """
    counts: Counter[str] = Counter()
    labels, parts = [], []
    for task in tasks:
        asked = questions(task, mode, criteria, principle)
        told = [_ask(question, answerer, cache, counts) for question in asked]
        pairs = list(_both_orders(asked, told)) if mode == "pairwise" else []
        parts.append(_sums(pairs))
        if None in told:
            counts["tasks_left_out"] += 1  # a ranking of some of its pairs would be another
            continue
        name = f"judge:{answerer.name}"
        if mode == "scored":
            labels.append(_scored(task, asked, [int(score or 0) for score in told], name))
        else:
            labels.append(label_for(task, name, _ranks(len(task.completions), pairs)))
        counts["tasks"] += 1
    table = np.array(parts, dtype=float).reshape(-1, 4)
    flips = clustered(lambda s: s[0] / s[1] if s[1] else np.nan, table, resamples)
    first = clustered(lambda s: s[2] / s[3] if s[3] else np.nan, table, resamples)
    return Judged(labels, counts, flips, first)


def _ask(question: Question, answerer: Answerer, cache: Cache, counts: Counter[str]) -> str | None:
    kind = "ABC" if question.criterion is None else f"1-{SCALE}"
    for attempt in range(ATTEMPTS):
        key = Cache.key(answerer.name, question.messages, attempt)
        row = cache.held.get(key)
        if row is None:
            text, asked, said = answerer.answer(question.messages, attempt)
            row = {"key": key, "task": question.task.id, "shown": list(question.shown), "criterion": question.criterion}
            row |= {"answer": text, "prompt_tokens": asked, "completion_tokens": said}
            cache.keep(row)
            counts["calls"] += 1
            counts["prompt_tokens"] += asked
            counts["completion_tokens"] += said
        else:
            counts["from_cache"] += 1
        if (found := verdict(row["answer"], kind)) is not None:
            return found
        counts["did_not_parse"] += 1
    return None


# What is said of a pair: its numbers, and for each of the two orders 1 if the first number wins, 0.5, or 0.
_Pair = tuple[int, int, float, float]
_WORTH = {"A": 1.0, "B": 0.0, "C": 0.5}


def _both_orders(asked: Sequence[Question], told: Sequence[str | None]) -> Iterator[_Pair]:
    for n in range(0, len(asked), 2):
        straight, turned = told[n], told[n + 1]
        if straight is not None and turned is not None:
            i, j = asked[n].shown
            yield i, j, _WORTH[straight], 1.0 - _WORTH[turned]


def _sums(pairs: Sequence[_Pair]) -> list[float]:
    """Flips and pairs; verdicts for the answer shown first, and verdicts that decide."""
    flips = sum(abs(one - other) == 1.0 for _, _, one, other in pairs)
    decided = [value for _, _, one, other in pairs for value in (one, 1.0 - other) if value != 0.5]
    return [flips, len(pairs), sum(decided), len(decided)]


def _ranks(count: int, pairs: Sequence[_Pair]) -> list[float]:
    """By wins over the others; a pair whose two orders contradict each other is a tie."""
    lost = [0.0] * count
    for i, j, one, other in pairs:
        share = 0.5 if abs(one - other) == 1.0 else (one + other) / 2
        lost[i] += 1.0 - share
        lost[j] += share
    return lost


def _scored(task: Task, asked: Sequence[Question], told: Sequence[int], name: str) -> Label:
    criteria: dict[str, list[float]] = {}
    for question, score in zip(asked, told, strict=True):
        criteria.setdefault(str(question.criterion), [0.0] * len(task.completions))[question.shown[0]] = float(score)
    means = [sum(scores) / len(scores) for scores in zip(*criteria.values(), strict=True)]
    return label_for(task, name, [-mean for mean in means], criteria=criteria)


def agreement_with(labels: Sequence[Label], people: Sequence[Label], resamples: int = 1000) -> tuple[Interval, int]:
    """Share of people's judgements of pairs that a judge agrees with, on tasks of both; and the number of those."""
    by_task = {label.task: label for label in labels}
    sums: dict[str, list[float]] = {}
    for person in people:
        own = by_task.get(person.task)
        if own is None:
            continue
        part = sums.setdefault(person.task, [0.0, 0.0])
        for i, j in itertools.combinations(range(len(own.ranks)), 2):
            same = np.sign(own.ranks[i] - own.ranks[j]) == np.sign(person.ranks[i] - person.ranks[j])
            part[0] += float(same)
            part[1] += 1.0
    table = np.array(list(sums.values())).reshape(-1, 2)
    return clustered(lambda s: s[0] / s[1] if s[1] else np.nan, table, resamples), len(sums)
