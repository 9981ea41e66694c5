"""What a browser posts, checked: nothing reaches the database that the page could not have said."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lit_align.feedback.annotate.guideline import Guideline
from lit_align.feedback.labels import STRENGTHS
from lit_align.feedback.tasks import Task

LONGEST_REASON = 2000


class Refused(Exception):
    """A request that changes nothing.

    Args:
        status: of HTTP.
        reason: one line, for the annotator.
    """

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status
        self.reason = reason


def posted_label(posted: Any, guideline: Guideline) -> dict[str, Any]:
    """A request's JSON, checked for what can be checked without its task.

    Raises:
        Refused: what is wrong with it.
    """
    if not isinstance(posted, dict):
        raise Refused(422, "expected an object")
    known = {"id", "task", "kind", "ranks", "strength", "criteria", "reason", "seconds", "guideline"}
    if unknown := set(posted) - known:
        raise Refused(422, f"unknown field {min(unknown)!r:.40}")
    for name, longest in (("id", 64), ("task", 64), ("kind", 10), ("guideline", 12)):
        value = posted.get(name)
        if (
            not isinstance(value, str)
            or not 1 <= len(value) <= longest
            or not value.isascii()
            or not value.isprintable()
        ):
            raise Refused(422, f"{name} must be a text of 1 to {longest} characters")
    if len(posted["id"]) < 16:
        raise Refused(422, "id must be at least 16 characters, drawn anew for each label")
    if posted["kind"] not in ("label", "skip", "flag"):
        raise Refused(422, "kind must be label, skip or flag")
    if posted["guideline"] != guideline.version:
        raise Refused(409, "the guideline has changed: reload the page and read it")
    seconds = posted.get("seconds")
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not 0 <= seconds <= 1e6:
        raise Refused(422, "seconds must be a number from 0 to 1,000,000")
    return {**posted, "seconds": float(seconds)}


def checked_answer(posted: dict[str, Any], task: Task, shown: Sequence[int], guideline: Guideline) -> dict[str, Any]:
    """What is stored of a label: ranks and scores in the task's order, and the order on the page.

    Raises:
        Refused: what is wrong with it.
    """
    count = len(task.completions)
    if posted["kind"] != "label":
        reason = posted.get("reason", "")
        if not isinstance(reason, str) or len(reason) > LONGEST_REASON:
            raise Refused(422, f"reason must be a text of at most {LONGEST_REASON:,} characters")
        if posted["kind"] == "flag" and not reason.strip():
            raise Refused(422, "a flag needs a reason")
        return {"reason": reason, "shown": list(shown)}
    ranks = _whole_numbers(posted.get("ranks"), count, 0, count - 1, "ranks")
    told: dict[str, Any] = {}
    strength = posted.get("strength")
    if count == 2 and ranks[0] != ranks[1]:
        if isinstance(strength, bool) or strength not in STRENGTHS:
            raise Refused(422, "strength must be 1, 2 or 3")
        told["strength"] = strength
    elif strength is not None:
        raise Refused(422, "strength is of two completions of which one is better")
    criteria = posted.get("criteria") or {}
    if not isinstance(criteria, dict) or set(criteria) != set(guideline.criteria):
        raise Refused(422, f"criteria must be {', '.join(guideline.criteria) or 'left out'}")
    scores = {n: _whole_numbers(criteria[n], count, 1, guideline.scale, f"criteria.{n}") for n in guideline.criteria}
    if scores:
        told["criteria"] = {name: _back(values, shown) for name, values in scores.items()}
    return {"ranks": _back(ranks, shown), "shown": list(shown), **told}


def _whole_numbers(value: Any, count: int, least: int, most: int, name: str) -> list[int]:
    fits = isinstance(value, list) and len(value) == count
    if not fits or not all(type(number) is int and least <= number <= most for number in value):
        raise Refused(422, f"{name} must be {count} whole numbers from {least} to {most}")
    return list(value)


def _back(values: Sequence[int], shown: Sequence[int]) -> list[int]:
    """Values in the order on the page, in that of the task."""
    return [value for _, value in sorted(zip(shown, values, strict=True))]
