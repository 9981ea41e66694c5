"""Who gets which task, and what becomes of the labels: everything of the page that is not HTTP.

One process serves a database. It holds what it needs in memory, reads it from the database at the start, and changes it
only after a commit: whoever is told that a label is stored finds it there after the process was killed.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from statistics import median
from typing import Any

import sqlalchemy as sa

from lit_align.feedback.annotate.guideline import Guideline
from lit_align.feedback.annotate.posted import Refused, checked_answer, posted_label
from lit_align.feedback.annotate.tables import ASSIGNMENTS, GUIDELINES, LABELS, TASKS
from lit_align.feedback.labels import Label, control_score
from lit_align.feedback.tasks import Task, label_for, shown_order

HELD = 1800.0  # seconds that a task which somebody has open counts as theirs
LEAST_CONTROLS = 3  # before a pass mark is applied


@dataclass(frozen=True)
class Rules:
    """How tasks are handed out.

    Attributes:
        annotators: their names.
        per_task: annotators that label each task.
        control_every: one task in so many is a control, while there are any.
        pass_mark: least mean share of pairs of controls that an annotator must get right to receive further tasks.
        seed: of orders on the page and of the places of controls.
    """

    annotators: tuple[str, ...]
    per_task: int = 2
    control_every: int = 10
    pass_mark: float = 0.7
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.annotators or len(set(self.annotators)) < len(self.annotators):
            raise ValueError(f"annotators must be names, no two alike, got {', '.join(self.annotators) or 'none'}")
        if not 1 <= self.per_task <= len(self.annotators):
            raise ValueError(
                f"per_task must be from 1 to the number of annotators ({len(self.annotators)}), got {self.per_task}"
            )
        if self.control_every < 2 or not 0 <= self.pass_mark <= 1:
            raise ValueError(
                f"control_every must be at least 2 and pass_mark from 0 to 1, got {self.control_every} and "
                f"{self.pass_mark}"
            )


@dataclass
class _Person:
    """What is known of an annotator: labels that count, by task, in their order; and tasks handed out, with when."""

    done: dict[str, dict[str, Any]] = field(default_factory=dict)
    handed: dict[str, float] = field(default_factory=dict)


class Desk:
    """Hands out tasks and stores labels; every method may be called from several threads.

    Args:
        engine: of the database.
        rules: how tasks are handed out.
        guideline: what annotators read; each version is stored.
        tasks: to add to those of the database.
        clock: seconds since the epoch.
    """

    def __init__(
        self,
        engine: sa.Engine,
        rules: Rules,
        guideline: Guideline,
        tasks: Iterable[Task] = (),
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.engine = engine
        self.rules = rules
        self.guideline = guideline
        self._clock = clock
        self._lock = threading.Lock()
        self._tasks: dict[str, Task] = {}
        self._people: dict[str, _Person] = {name: _Person() for name in rules.annotators}
        self._labelled: dict[str, int] = defaultdict(int)  # annotators whose label of a task counts
        self._open: dict[str, dict[str, float]] = defaultdict(dict)  # who has a task open since when
        self._add(tasks)
        self._load()

    def _add(self, tasks: Iterable[Task]) -> None:
        with self.engine.begin() as connection:
            known = set(connection.execute(sa.select(TASKS.c.id)).scalars())
            made = []
            for task in tasks:
                if task.id not in known:
                    known.add(task.id)
                    body = json.dumps(asdict(task))
                    made.append({"id": task.id, "place": len(known), "control": task.answer is not None, "body": body})
            if made:
                connection.execute(sa.insert(TASKS), made)
            version = self.guideline.version
            if connection.execute(sa.select(GUIDELINES).where(GUIDELINES.c.version == version)).first() is None:
                stored = {"version": version, "body": json.dumps(asdict(self.guideline)), "time": self._now()}
                connection.execute(sa.insert(GUIDELINES).values(**stored))

    def _load(self) -> None:
        with self.engine.connect() as connection:
            for (body,) in connection.execute(sa.select(TASKS.c.body).order_by(TASKS.c.place)):
                task = task_of(json.loads(body))
                self._tasks[task.id] = task
            for task, name, when in connection.execute(sa.select(ASSIGNMENTS)):
                person = self._people.setdefault(name, _Person())
                person.handed[task] = when
                self._open[task][name] = when
            counted = sa.select(LABELS).where(LABELS.c.withdrawn == sa.false()).order_by(LABELS.c.number)
            for row in connection.execute(counted).mappings():
                self._count(dict(row))
        if not self._tasks:
            raise ValueError("the database holds no tasks: name a file of completions")

    def _count(self, row: dict[str, Any]) -> None:
        self._people.setdefault(row["annotator"], _Person()).done[row["task"]] = row
        self._labelled[row["task"]] += row["kind"] == "label"
        self._open[row["task"]].pop(row["annotator"], None)

    # ---- for annotators

    def current(self, name: str) -> dict[str, Any]:
        """Progress of an annotator, and the task that they have open or the next one; None where there is none."""
        with self._lock:
            return self._answer(name, self._next(name))

    def store(self, name: str, posted: Any) -> dict[str, Any]:
        """Store what an annotator says of a task, and hand out the next one, in one commit.

        A request that was stored before, whose answer got lost, stores nothing and gets the same answer.

        Raises:
            Refused: it does not fit, or is not theirs to say; nothing has changed.
        """
        kept = posted_label(posted, self.guideline)
        with self._lock:
            person, task = self._people[name], self._tasks.get(kept["task"])
            before = person.done.get(kept["task"])
            if before is not None and before["id"] == kept["id"]:
                return self._answer(name, self._next(name))
            if task is None or kept["task"] not in person.handed:
                raise Refused(404, "this task was not handed to you")
            if before is not None:
                raise Refused(409, "you have labelled this task: undo it first")
            shown = self._order(task, name)
            answer = checked_answer(kept, task, shown, self.guideline)
            row = {
                "id": kept["id"], "task": task.id, "annotator": name, "kind": kept["kind"],
                "answer": json.dumps(answer), "guideline": self.guideline.version, "seconds": kept["seconds"],
                "time": self._now(), "withdrawn": False,
            }  # fmt: skip
            try:
                with self.engine.begin() as connection:
                    stored = connection.execute(sa.insert(LABELS).values(**row))
            except sa.exc.IntegrityError as error:
                raise Refused(409, "a label of this name is stored already: reload the page") from error
            (number,) = stored.inserted_primary_key or (None,)
            self._count({**row, "number": number})
            return self._answer(name, self._next(name))

    def undo(self, name: str) -> dict[str, Any]:
        """Withdraw an annotator's last label, and show its task again with what was said.

        Raises:
            Refused: there is none.
        """
        with self._lock:
            person = self._people[name]
            if not person.done:
                raise Refused(409, "there is nothing to undo")
            task, row = next(reversed(person.done.items()))
            when = self._clock()
            with self.engine.begin() as connection:
                connection.execute(sa.update(LABELS).where(LABELS.c.id == row["id"]).values(withdrawn=True))
                of = (ASSIGNMENTS.c.task == task) & (ASSIGNMENTS.c.annotator == name)
                connection.execute(sa.update(ASSIGNMENTS).where(of).values(time=when))
            del person.done[task]
            self._labelled[task] -= row["kind"] == "label"
            person.handed[task] = self._open[task][name] = when
            return {**self._answer(name, self._tasks[task]), "said": json.loads(row["answer"])}

    def _answer(self, name: str, task: Task | None) -> dict[str, Any]:
        return {"progress": self._progress(name), "task": self._shown(name, task), "screened": self._screened(name)}

    def _next(self, name: str) -> Task | None:
        """The open task of an annotator, or a new one, which is then theirs."""
        person = self._people[name]
        still = [task for task in person.handed if task not in person.done and task in self._tasks]
        if still:
            return self._tasks[max(still, key=lambda task: person.handed[task])]
        task = None if self._screened(name) else self._choose(name)
        if task is None:
            return None
        when = self._clock()
        with self.engine.begin() as connection:
            connection.execute(sa.insert(ASSIGNMENTS).values(task=task.id, annotator=name, time=when))
        person.handed[task.id] = self._open[task.id][name] = when
        return task

    def _choose(self, name: str) -> Task | None:
        """A control where one is due; otherwise the task that lacks fewest labels, the earliest of them."""
        person = self._people[name]
        new = [task for task in self._tasks.values() if task.id not in person.handed]
        controls = [task for task in new if task.answer is not None]
        if controls and self._control_is_due(name, len(person.handed)):
            digest = hashlib.sha256(f"{self.rules.seed}\0{name}\0{len(person.handed)}".encode()).digest()
            return controls[digest[0] % len(controls)]
        taken = {task.id: self._taken(task.id) for task in new if task.answer is None}
        free = [task for task, count in taken.items() if count < self.rules.per_task]
        return self._tasks[max(free, key=lambda task: taken[task])] if free else None

    def _control_is_due(self, name: str, number: int) -> bool:
        """One control in each block of `control_every` tasks, at a place that differs from block to block."""
        block, place = divmod(number, self.rules.control_every)
        digest = hashlib.sha256(f"{self.rules.seed}\0{name}\0block {block}".encode()).digest()
        return place == int.from_bytes(digest[:4], "big") % self.rules.control_every

    def _taken(self, task: str) -> int:
        held = self._open.get(task)
        fresh = sum(when > self._clock() - HELD for when in held.values()) if held else 0
        return self._labelled[task] + fresh

    def _order(self, task: Task, name: str) -> tuple[int, ...]:
        return shown_order(task.id, len(task.completions), name, self.rules.seed)

    def _shown(self, name: str, task: Task | None) -> dict[str, Any] | None:
        """A task as the page gets it: nothing of sources, categories or controls."""
        if task is None:
            return None
        texts = [task.completions[k] for k in self._order(task, name)]
        return {"id": task.id, "prompt": turns_of(task.prompt), "completions": texts}

    def _progress(self, name: str) -> dict[str, Any]:
        person = self._people[name]
        left = sum(
            task.answer is None and task.id not in person.done
            and (task.id in person.handed or self._taken(task.id) < self.rules.per_task)
            for task in self._tasks.values()
        )  # fmt: skip
        times = [row["seconds"] for row in person.done.values()][-50:]
        return {"done": len(person.done), "left": left, "seconds_left": median(times) * left if times else None}

    def _screened(self, name: str) -> bool:
        scores = self._control_scores(name)
        return len(scores) >= LEAST_CONTROLS and sum(scores) / len(scores) < self.rules.pass_mark

    def _control_scores(self, name: str) -> list[float]:
        rows = [row for row in self._people[name].done.values() if row["kind"] == "label"]
        told = [self._label(row) for row in rows if self._tasks[row["task"]].answer is not None]
        return [score for score in map(control_score, told) if score is not None]

    # ---- for the administrator

    def labels(self, screened: bool = False) -> list[Label]:
        """Labels that count, in the order they came.

        Args:
            screened: those of annotators below the pass mark, too.
        """
        with self._lock:
            out = set() if screened else {name for name in self._people if self._screened(name)}
            rows = [row for name, p in self._people.items() if name not in out for row in p.done.values()]
            rows = [row for row in rows if row["kind"] == "label"]
            return [self._label(row) for row in sorted(rows, key=lambda row: row["number"])]

    def flags(self) -> list[dict[str, Any]]:
        """Tasks that annotators flagged, with their reasons."""
        with self._lock:
            return [
                {
                    "task": row["task"],
                    "annotator": name,
                    "reason": json.loads(row["answer"])["reason"],
                    "time": row["time"],
                }
                for name, person in self._people.items()
                for row in person.done.values()
                if row["kind"] == "flag"
            ]

    def overview(self) -> dict[str, Any]:
        """Progress of the whole and of each annotator."""
        with self._lock:
            tasks = [task for task in self._tasks.values() if task.answer is None]
            people = []
            for name, person in self._people.items():
                kinds = [row["kind"] for row in person.done.values()]
                scores = self._control_scores(name)
                people.append(
                    {
                        "annotator": name,
                        **{kind: kinds.count(kind) for kind in ("label", "skip", "flag")},
                        "left": self._progress(name)["left"],
                        "controls": len(scores),
                        "controls_passed": sum(scores) / len(scores) if scores else None,
                        "screened": self._screened(name),
                        "median_seconds": median(r["seconds"] for r in person.done.values()) if person.done else None,
                    }
                )
            done = sum(self._labelled[task.id] >= self.rules.per_task for task in tasks)
            counts = {"tasks": len(tasks), "tasks_done": done, "controls": len(self._tasks) - len(tasks)}
            labels = sum(min(self._labelled[task.id], self.rules.per_task) for task in tasks)
            return {**counts, "labels": labels, "wanted": len(tasks) * self.rules.per_task, "annotators": people}

    def _label(self, row: dict[str, Any]) -> Label:
        task, answer = self._tasks[row["task"]], json.loads(row["answer"])
        return label_for(
            task, row["annotator"], answer["ranks"], strength=answer.get("strength"),
            criteria=answer.get("criteria") or {}, guideline=row["guideline"], shown=tuple(answer["shown"]),
            seconds=row["seconds"], time=row["time"],
        )  # fmt: skip

    def _now(self) -> str:
        return datetime.fromtimestamp(self._clock(), UTC).isoformat(timespec="microseconds")


def task_of(body: dict[str, Any]) -> Task:
    """A task from its JSON."""
    tuples = {name: tuple(body[name]) for name in ("completions", "finished", "answer") if body.get(name) is not None}
    return Task(**{**body, **tuples})


def turns_of(prompt: Any) -> list[dict[str, str]]:
    """A prompt as turns of role and text."""
    if isinstance(prompt, str):
        return [{"role": "prompt", "content": prompt}]
    return [{"role": str(turn.get("role", "")), "content": _said(turn)} for turn in prompt]


def _said(turn: dict[str, Any]) -> str:
    calls = [json.dumps(call, ensure_ascii=False) for call in turn.get("tool_calls") or ()]
    return "\n".join([str(turn.get("content") or ""), *calls]).strip("\n")
