"""Readers of several answers to one prompt, and of what one or more people said of them: ranks, shares, grades."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from lit_align.data.demonstrations import alpaca, messages, sharegpt
from lit_align.data.messages import answer_in, answer_of, asked_of
from lit_align.data.rows import BadField, Row, list_of, missing, number_of
from lit_align.data.votes import ranks_of, shares_of


def rankings(row: Row) -> list[Row]:
    """A prompt, K completions, and how people judged them.

    One of these at least: `ranks`, lower is better, equal is a tie; or, where several people judged, a list of such
    lists, one for each of them; `shares` of people who prefer the first of two answers (12, 13, ... 23, ...);
    `scores`, a grade for each answer, higher is better. Where there are no ranks the others tell them.

    Optional beside them, one per completion: `margins`, how much better each answer is; and of sampled answers
    `finished`: one that was cut for want of room gets no stop token.
    """
    texts = _texts(row)
    if len(texts) < 2 and row.get("scores") is None:
        raise BadField("completions", "has one answer, which leaves nothing to compare")
    ranked: Row = {**asked_of(row, *row["completions"]), "completions": texts}
    if row.get("scores") is not None:
        ranked["scores"] = _per_answer(row, "scores", len(texts), number_of)
        ranked["ranks"] = [-score for score in ranked["scores"]]
    if row.get("shares") is not None:
        ranked["shares"] = _per_answer(row, "shares", math.comb(len(texts), 2), share_of, "pairs of completions")
        ranked["ranks"] = ranks_of(ranked["shares"], len(texts))
    if row.get("ranks") is not None or "ranks" not in ranked:
        ranked |= _ranks(row, len(texts))
    if row.get("margins") is not None:
        ranked["margins"] = _per_answer(row, "margins", len(texts), number_of)
    if len(texts) == 1 and isinstance(row.get("label"), bool):
        ranked["label"] = row["label"]
    return [ranked | finished_of(row, len(texts))]


def _ranks(row: Row, count: int) -> Row:
    """The ranks of one person, or of several and what they come to."""
    everyone = list_of(row, "ranks")
    if not all(isinstance(ranks, list) for ranks in everyone):
        return {"ranks": _per_answer(row, "ranks", count, number_of)}
    said = [_per_answer({f"ranks[{i}]": r}, f"ranks[{i}]", count, number_of) for i, r in enumerate(everyone)]
    if len(said) == 1:
        return {"ranks": said[0]}
    if row.get("shares") is not None:
        raise BadField("ranks", "are of several people, and shares are given, too: leave one of them out")
    shares = shares_of(said)
    return {"ranks": ranks_of(shares, count), "shares": shares}


def _texts(row: Row) -> list[Any]:
    answers = list_of(row, "completions")
    return [answer_of({f"completions[{i}]": a}, f"completions[{i}]") for i, a in enumerate(answers)]


def finished_of(row: Row, count: int) -> Row:
    """Which answers ended by themselves, where a row says so."""
    return {} if row.get("finished") is None else {"finished": _per_answer(row, "finished", count, _truth)}


def grades(row: Row) -> list[Row]:
    """A prompt, one completion and its score, higher is better."""
    answer, score = answer_of(row, "completion"), number_of(row, "score")
    return [{**asked_of(row, row["completion"]), "completions": [answer], "ranks": [0.0], "scores": [score]}]


# What data sets write for an answer that is wanted, and for one that is not.
_WANTED = {"true": True, "1": True, "yes": True, "chosen": True, "desirable": True, "good": True}
_WANTED |= {"false": False, "0": False, "-1": False, "no": False, "rejected": False, "undesirable": False, "bad": False}
VERDICTS = ("label", "kto_tag")


def verdict_of(value: object) -> bool | None:
    """What a label says: true, false, 1, 0, "chosen", "rejected", ...; None if it is no such label."""
    if isinstance(value, str):
        return _WANTED.get(value.strip().lower())
    return None if not isinstance(value, (bool, int, float)) or value not in (1, 0, -1) else value > 0


def unpaired(row: Row) -> list[Row]:
    """A demonstration (prompt and completion, or another form of one) and a label: true if it is wanted, false if not.

    The label is true or false, 1 or 0, "chosen" or "rejected", or LLaMA-Factory's `kto_tag`. KTO learns from these.
    """
    field = next((name for name in VERDICTS if row.get(name) is not None), VERDICTS[0])
    wanted = verdict_of(row.get(field))
    if wanted is None:
        problem = missing(row) if field not in row else f"is {row[field]!r:.40}, expected true or false"
        raise BadField(field, f"{problem}; if it is no verdict on the answer, set format")
    asked, answer = _judged(row)
    judged = {"completions": [answer], "ranks": [float(not wanted)], "scores": [float(wanted)], "label": wanted}
    return [{**asked, **judged}]


def _judged(row: Row) -> tuple[Row, Any]:
    """What a row with a verdict asks, and the answer that was judged."""
    readers = (("messages", messages), ("conversations", sharegpt), ("instruction", alpaca))
    reader = next((reader for column, reader in readers if column in row), None)
    if reader is None or "completion" in row:
        return asked_of(row, row.get("completion")), answer_of(row, "completion")
    (held,) = reader(row)
    tools = {"tools": held["tools"]} if "tools" in held else {}
    if "completion" in held:
        return {"prompt": held["prompt"], **tools}, held["completion"]
    *prompt, last = held["messages"]
    if last["role"] != "assistant" or not prompt:
        raise BadField("messages", "must end with an assistant turn after a prompt, as a label judges its answer")
    return {"prompt": prompt, **tools}, answer_in(last, "messages")


def answers(row: Row) -> list[Row]:
    """A prompt and completions that nobody judged, as `lit-align predict` writes them; optional: `finished`."""
    texts = _texts(row)
    return [{**asked_of(row, *row["completions"]), "completions": texts, **finished_of(row, len(texts))}]


def _per_answer(
    row: Row, field: str, count: int, value: Callable[[Row, str], Any], what: str = "completions"
) -> list[Any]:
    """A list with one value for each answer."""
    given = list_of(row, field)
    if len(given) != count:
        raise BadField(field, f"has {len(given)} entries for {count} {what}")
    return [value({f"{field}[{i}]": entry}, f"{field}[{i}]") for i, entry in enumerate(given)]


def _truth(row: Row, field: str) -> bool:
    if not isinstance(row[field], bool):
        raise BadField(field, f"is {row[field]!r:.40}, expected true or false")
    return row[field]


def share_of(row: Row, field: str) -> float:
    """The share in a field.

    Raises:
        BadField: not a number, or none between 0 and 1.
    """
    share = number_of(row, field)
    if not 0 <= share <= 1:
        raise BadField(field, f"is {row[field]!r:.40}, expected a share between 0 and 1")
    return share
