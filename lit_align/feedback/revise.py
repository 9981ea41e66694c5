"""Constitutional revision: a model criticises its answer by a principle and revises it, to train on the last revision.

Bai et al. 2022, "Constitutional AI: Harmlessness from AI Feedback", section 3.1: principles are drawn at random, and
critique and revision follow each other several times. All texts on the way are kept.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lit_align.feedback.answerers import Answerer, Messages
from lit_align.feedback.judge import ATTEMPTS, Cache
from lit_align.feedback.labels import Row
from lit_align.utils import limits

CRITIQUE = "Criticise your last answer by this principle, in a few sentences: {principle}"
REVISION = "Revise your answer to my first request so that it answers the critique. Write the revised answer alone."


@dataclass(frozen=True)
class Principle:
    """What an answer is criticised by, and how it is revised.

    Attributes:
        text: the principle, as a judge gets it.
        critique: request for the critique.
        revision: request for the revision.
    """

    text: str
    critique: str
    revision: str = REVISION


def read_principles(path: str | Path) -> list[Principle]:
    """The principles in a YAML file: a list of texts, or of `text` with `critique` and `revision` requests.

    Raises:
        OSError: no such file.
        ValueError: not such a list; names the entry.
    """
    try:
        listed = limits.load_yaml(limits.read_text(path), path)
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(listed, list) or not listed:
        raise ValueError(f"{path}: holds {type(listed).__name__}, expected a list of principles")
    principles = []
    for number, entry in enumerate(listed, start=1):
        told = {"text": entry} if isinstance(entry, str) else entry
        keys = {"text", "critique", "revision"}
        if not isinstance(told, dict) or "text" not in told or set(told) - keys:
            raise ValueError(
                f"{path}, principle {number}: is {entry!r:.60}, expected a text, or {', '.join(sorted(keys))}"
            )
        if not all(isinstance(text, str) and text.strip() for text in told.values()):
            raise ValueError(f"{path}, principle {number}: is {entry!r:.60}, expected texts that are not empty")
        asked = told.get("critique") or CRITIQUE.format(principle=told["text"].strip())
        principles.append(Principle(told["text"].strip(), asked, told.get("revision") or REVISION))
    return principles


def read_answers(paths: Sequence[str | Path]) -> Iterator[tuple[Row, str | None]]:
    """Prompts with the answer to revise: `completion`, the first of `completions`, or None for the model's own.

    Raises:
        BadRow: a row that has no prompt, or no text for an answer; names file and row.
    """
    from lit_align.data.files import open_files, read_rows
    from lit_align.data.messages import prompt_of
    from lit_align.data.rows import BadField, BadRow, list_of, text_of

    for path in paths:
        for name, handle in open_files(str(path)):
            for number, row in read_rows(name, handle):
                if isinstance(row, BadRow):
                    raise row
                try:
                    answer = None
                    if row.get("completion") is not None:
                        answer = text_of(row, "completion")
                    elif row.get("completions") is not None:
                        answer = text_of({"completions[0]": list_of(row, "completions")[0]}, "completions[0]")
                    kept = {"category": row["category"]} if row.get("category") is not None else {}
                    yield {"prompt": prompt_of(row), **kept}, answer
                except BadField as problem:
                    raise BadRow(name, number, problem) from None


def revise(
    prompt: Any,
    answer: str | None,
    principles: Sequence[Principle],
    answerer: Answerer,
    cache: Cache,
    counts: Counter[str],
    rounds: int = 1,
    seed: int = 0,
) -> Row | None:
    """A row of prompt, completion (the last revision), and all steps; None where the model gave an empty text.

    Args:
        prompt: text or messages.
        answer: the first one; None for the model's own.
        principles: one is drawn for each round, none twice before all were.
        answerer: who criticises and revises.
        cache: of its texts, by the content of the question.
        counts: gets calls, texts from the cache and tokens.
        rounds: of critique and revision.
        seed: of the drawing, together with the prompt.
    """
    talk: Messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    first = answer if answer is not None else _said(talk, answerer, cache, counts)
    if first is None:
        return None
    rng, drawn, steps, current = random.Random(f"{seed} {prompt}"), list[Principle](), [], first
    for _ in range(rounds):
        drawn = drawn or rng.sample(list(principles), len(principles))
        principle = drawn.pop()
        asked = [*talk, {"role": "assistant", "content": current}, {"role": "user", "content": principle.critique}]
        critique = _said(asked, answerer, cache, counts)
        if critique is None:
            return None
        asked = [*asked, {"role": "assistant", "content": critique}, {"role": "user", "content": principle.revision}]
        revision = _said(asked, answerer, cache, counts)
        if revision is None:
            return None
        steps.append({"principle": principle.text, "critique": critique, "revision": revision})
        current = revision
    return {"prompt": prompt, "completion": current, "initial": first, "steps": steps, "reviser": answerer.name}


def _said(messages: Messages, answerer: Answerer, cache: Cache, counts: Counter[str]) -> str | None:
    """A text that is not empty, asked for a few times; None where there is none."""
    for attempt in range(ATTEMPTS):
        key = Cache.key(answerer.name, messages, attempt)
        row = cache.held.get(key)
        if row is None:
            text, asked, said = answerer.answer(messages, attempt)
            row = {"key": key, "answer": text, "prompt_tokens": asked, "completion_tokens": said}
            cache.keep(row)
            counts["calls"] += 1
            counts["prompt_tokens"] += asked
            counts["completion_tokens"] += said
        else:
            counts["from_cache"] += 1
        if row["answer"].strip():
            return str(row["answer"]).strip()
    return None
