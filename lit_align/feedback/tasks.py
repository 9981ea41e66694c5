"""Tasks for annotators: a prompt with the K distinct completions of one or several models, blinded.

`lit-align predict` writes K completions a prompt; files of several models, checkpoints or temperatures become one list
of tasks. Copies of a text are merged and keep the sources of each copy. Neither the order of completions in a task nor
that on a page tells which model wrote them: one is by a hash of the text, the other is drawn anew for each annotator.
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lit_align.feedback.labels import Label, Row, label_of, neutral_order, task_id

MOST_COMPLETIONS = 26  # a letter for each
MOST_CHARACTERS = 1_000_000  # of a prompt with its completions


@dataclass(frozen=True)
class Task:
    """A prompt and K distinct completions to compare.

    Attributes:
        id: see `task_id`.
        prompt: text or messages.
        completions: in neutral order.
        sources: for each completion, an entry for each copy that was merged: file, row, and what the row says of the
            model that wrote it.
        finished: for each completion, whether any copy ended by itself.
        category: of the prompt.
        tools: of the prompt.
        answer: of a control: the known ranks.
    """

    id: str
    prompt: Any
    completions: tuple[str, ...]
    sources: list[list[Row]] = field(default_factory=list)
    finished: tuple[bool, ...] | None = None
    category: str | None = None
    tools: Any = None
    answer: tuple[float, ...] | None = None


@dataclass
class _Gathered:
    """Completions to one prompt, by text."""

    prompt: Any
    tools: Any
    category: str | None
    sources: dict[str, list[Row]] = field(default_factory=dict)
    finished: dict[str, bool] = field(default_factory=dict)


# What a row may say of the model that wrote its completions.
PROVENANCE = ("model", "checkpoint", "temperature", "top_p", "seed", "sampled")


def build_tasks(
    paths: Sequence[str | Path], names: Sequence[str] | None = None, merge: bool = True
) -> tuple[list[Task], Counter[str]]:
    """Tasks out of files of prompts with completions, in the order of the first file; and counts of what was merged.

    Args:
        paths: files that `lit-align predict` wrote, or any that have prompt and completions, or chosen and rejected.
        names: how sources are called, one for each file; the file's path where None.
        merge: put completions to the same prompt, from several rows or files, into one task.

    Raises:
        BadRow: a row without completions, one whose task has more than 26 or more than a million characters, or a
            field that does not fit; names file and row.
        ValueError: no such file, or no task is left.
    """
    from lit_align.data.files import open_files, read_rows
    from lit_align.data.rows import BadField, BadRow

    gathered: dict[str, _Gathered] = {}
    counts: Counter[str] = Counter()
    for number, path in enumerate(paths):
        for name, handle in open_files(str(path)):
            for row_number, row in read_rows(name, handle):
                if isinstance(row, BadRow):
                    raise row
                counts["rows"] += 1
                source = names[number] if names else name
                try:
                    key = _gather(row, source, (name, row_number), gathered, merge, counts)
                    _check(gathered[key])
                except BadField as problem:
                    raise BadRow(name, row_number, problem) from None
    tasks = []
    for held in gathered.values():
        if len(held.sources) < 2:
            counts["left_out_with_one_distinct_completion"] += 1
            continue
        tasks.append(_task(held))
    counts["tasks"] = len(tasks)
    if not tasks:
        raise ValueError(
            f"{', '.join(map(str, paths))}: no prompt has two distinct completions to compare: sample more (for one "
            "with model.sampling.samples and a temperature above 0), or name the files of several models"
        )
    return tasks, counts


def _gather(
    row: Row, source: str, where: tuple[str, int], gathered: dict[str, _Gathered], merge: bool, counts: Counter[str]
) -> str:
    """Add a row's completions to those of its prompt; return the key of the prompt."""
    from lit_align.data.formats import FORMATS
    from lit_align.data.rows import text_of

    reader = "pairs" if "chosen" in row and "completions" not in row else "answers"
    (read,) = FORMATS[reader](row)
    texts = [text_of({f"completions[{k}]": text}, f"completions[{k}]") for k, text in enumerate(read["completions"])]
    key = task_id(read["prompt"], [str(row.get("tools"))] + ([] if merge else [f"{where}"]))
    category = None if row.get("category") is None else str(row["category"])
    held = gathered.setdefault(key, _Gathered(read["prompt"], read.get("tools"), category))
    told = {name: row[name] for name in PROVENANCE if row.get(name) is not None}
    finished = read.get("finished") or [True] * len(texts)
    for k, (text, ended) in enumerate(zip(texts, finished, strict=True)):
        counts["completions"] += 1
        counts["duplicates_merged"] += text in held.sources
        held.sources.setdefault(text, []).append({"source": source, "row": where[1], "completion": k, **told})
        held.finished[text] = held.finished.get(text, False) or ended
    return key


def _check(held: _Gathered) -> None:
    from lit_align.data.rows import BadField

    if len(held.sources) > MOST_COMPLETIONS:
        problem = f"come to {len(held.sources)} distinct answers to one prompt; a page ranks at most {MOST_COMPLETIONS}"
        raise BadField("completions", problem)
    size = len(str(held.prompt)) + sum(map(len, held.sources))
    if size > MOST_CHARACTERS:
        problem = f"and its prompt hold {size:,} characters; a page shows at most {MOST_CHARACTERS:,}"
        raise BadField("completions", problem)


def _task(held: _Gathered) -> Task:
    texts = list(held.sources)
    ordered = [texts[k] for k in neutral_order(texts)]
    return Task(
        id=task_id(held.prompt, ordered),
        prompt=held.prompt,
        completions=tuple(ordered),
        sources=[held.sources[text] for text in ordered],
        finished=tuple(held.finished[text] for text in ordered),
        category=held.category,
        tools=held.tools,
    )


def build_controls(path: str | Path) -> list[Task]:
    """Control questions: tasks whose right ranking is known, out of label rows or pairs.

    Raises:
        BadRow: a row without a ranking; names file and row.
        ValueError: no such file, or no controls in it.
    """
    from lit_align.data.files import open_files, read_rows
    from lit_align.data.rows import BadField, BadRow

    controls: dict[str, Task] = {}
    for name, handle in open_files(str(path)):
        for number, row in read_rows(name, handle):
            if isinstance(row, BadRow):
                raise row
            try:
                label = label_of({"annotator": "control", **row})
                if len(set(label.ranks)) < 2:
                    raise BadField("ranks", "tie: a control needs an answer that is right and one that is not")
            except BadField as problem:
                raise BadRow(name, number, problem) from None
            task = Task(label.task, label.prompt, label.completions, category=label.category, answer=label.ranks)
            controls[task.id] = task
    if not controls:
        raise ValueError(f"{path}: holds no controls")
    return list(controls.values())


def shown_order(task: str, completions: int, annotator: str, seed: int = 0) -> tuple[int, ...]:
    """In which order an annotator sees the completions of a task: drawn for each annotator, the same at each reload."""
    digest = hashlib.sha256(f"{seed}\0{task}\0{annotator}".encode()).digest()
    order = list(range(completions))
    random.Random(digest).shuffle(order)
    return tuple(order)


def label_for(task: Task, annotator: str, ranks: Sequence[float], **told: Any) -> Label:
    """The label of a task by an annotator; `told` are further fields of `Label`."""
    return replace(
        Label(task.prompt, task.completions, tuple(map(float, ranks)), annotator, task.id),
        **{"category": task.category, "finished": task.finished, "tools": task.tools,
           "sources": task.sources or None, "control": task.answer is not None,
           "expected": task.answer, **told},
    )  # fmt: skip
