"""Public formats, each a small reader from a raw row to rows of the one schema (`data/rows.py`).

A reader takes a raw row as its file has it and returns the rows it holds: mostly one, several for a tree or a task with
many instances. Other column names are mapped before (`Source.columns`), so a reader knows only its own.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

from lit_align.data.demonstrations import (
    alpaca,
    instances,
    messages,
    prompt_completion,
    question_of,
    sharegpt,
    tools_beside,
)
from lit_align.data.messages import (
    Message,
    Messages,
    answer_in,
    answer_of,
    asked_of,
    messages_of,
    system_of,
    with_system,
)
from lit_align.data.rankings import VERDICTS, answers, finished_of, grades, rankings, share_of, unpaired, verdict_of
from lit_align.data.rows import KINDS, BadField, Row, filled, list_of, number_of, text_of, user
from lit_align.data.votes import ranks_of

Reader = Callable[[Row], list[Row]]


def _pair(asked: Row, chosen: str | Message, rejected: str | Message, **told: Any) -> list[Row]:
    return [{**asked, "completions": [chosen, rejected], "ranks": [0.0, 1.0], **told}]


def pairs(row: Row) -> list[Row]:
    """Preference pairs: prompt (or Alpaca's instruction and input), chosen, rejected.

    Optional beside them: `margin`; `share`, of several people who prefer the chosen one; `score_chosen` and
    `score_rejected`, their grades; `finished`, of sampled answers, as in `rankings`. Where the two are whole
    conversations, they differ in the last turn, and what comes before it is the prompt, beside whatever a prompt column
    says (UltraFeedback, TRL's implicit prompt).
    """
    told: Row = {}
    if row.get("margin") is not None:
        told["margins"] = [number_of(row, "margin"), 0.0]
    if row.get("share") is not None:
        told["shares"] = [share_of(row, "share")]
        told["ranks"] = ranks_of(told["shares"], 2)
    if row.get("score_chosen") is not None and row.get("score_rejected") is not None:
        told["scores"] = [number_of(row, f"score_{side}") for side in ("chosen", "rejected")]
    if isinstance(row.get("finished"), list):  # what is no list is somebody's column of that name
        told |= finished_of(row, 2)
    sides = [row.get("chosen"), row.get("rejected")]
    has_prompt = row.get("prompt") is not None or row.get("instruction") is not None
    if any(isinstance(side, list) and len(side) > 1 for side in sides) or not has_prompt:
        chosen, rejected = messages_of(row, "chosen"), messages_of(row, "rejected")
        answers = _answer(chosen, "chosen"), _answer(rejected, "rejected")
        asked = {"prompt": with_system(row, _shared(chosen, rejected)), **tools_beside(row)}
        return _pair(asked, *answers, **told)
    asked = {"prompt": question_of(row), **tools_beside(row)} if row.get("prompt") is None else asked_of(row, *sides)
    return _pair(asked, answer_of(row, "chosen"), answer_of(row, "rejected"), **told)


def _shared(chosen: Messages, rejected: Messages) -> Messages:
    """What two conversations were both answers to."""
    if chosen[:-1] != rejected[:-1]:
        raise BadField("rejected", "answers another conversation than chosen: their earlier turns differ")
    if not chosen[:-1] or chosen[-2]["role"] == "assistant":
        raise BadField("chosen", "has nothing that its last turn would answer")
    return chosen[:-1]


def _answer(turns: Messages, field: str) -> str | Message:
    if turns[-1]["role"] != "assistant":
        raise BadField(field, f"ends with a turn of {turns[-1]['role']}, expected an answer by the assistant")
    return answer_in(turns[-1], field)


def hh(row: Row) -> list[Row]:
    r"""Anthropic HH-RLHF: chosen and rejected as flat strings of "\n\nHuman: ..." and "\n\nAssistant: ..." turns."""
    chosen, rejected = (_hh_turns(field, filled(row, field)) for field in ("chosen", "rejected"))
    return _pair({"prompt": _shared(chosen, rejected)}, chosen[-1]["content"], rejected[-1]["content"])


def _hh_turns(field: str, text: str) -> Messages:
    turns = []
    before, *parts = text.split("\n\nHuman:")
    for part in parts:
        question, *answers = part.split("\n\nAssistant:")
        turns.append({"role": "user", "content": question.strip()})
        turns += [{"role": "assistant", "content": answer.strip()} for answer in answers]
    if before.strip() or len(turns) < 2 or turns[-1]["role"] != "assistant":
        raise BadField(
            field, 'is not a dialogue of "\\n\\nHuman:" and "\\n\\nAssistant:" turns that the assistant ends'
        )
    return turns


def preferred(row: Row) -> list[Row]:
    """The preferred answer of a pair, or of HH-RLHF, as a demonstration (Preferred-FT of Rafailov et al. 2023)."""
    (pair,) = (hh if recognise(row) == "hh" else pairs)(row)
    answer, tools = pair["completions"][0], {"tools": pair["tools"]} if "tools" in pair else {}
    chosen = filled({"chosen": answer}, "chosen") if isinstance(answer, str) else answer
    return [{"prompt": pair["prompt"], "completion": chosen, **tools}]


def nectar(row: Row) -> list[Row]:
    """Nectar: a dialogue that ends with the user's turn, as in HH-RLHF, and answers of {"answer", "rank"}."""
    asked = filled(row, "prompt").rstrip()
    if not asked.endswith("\n\nAssistant:"):
        raise BadField("prompt", f"ends with {asked[-20:]!r}, expected a turn of the assistant that is to be written")
    answers = []
    for i, answer in enumerate(list_of(row, "answers")):
        if not isinstance(answer, dict):
            raise BadField(f"answers[{i}]", f"is {type(answer).__name__}, expected answer and rank")
        try:
            answers.append((text_of(answer, "answer").strip(), number_of(answer, "rank")))
        except BadField as problem:
            raise problem.inside(f"answers[{i}]") from None
    texts, ranks = zip(*answers, strict=True)
    return [{"prompt": _hh_turns("prompt", asked)[:-1], "completions": list(texts), "ranks": list(ranks)}]


def oasst(row: Row) -> list[Row]:
    """OpenAssistant message trees: every prompter turn whose replies people ranked becomes one ranking."""
    rankings: list[Row] = []

    def visit(node: object, where: str, path: Messages) -> None:
        if not isinstance(node, dict):
            raise BadField(where, f"is {type(node).__name__}, expected a message of a tree")
        try:
            path = [*path, {"role": _oasst_role(node), "content": text_of(node, "text")}]
            if node.get("rank") is not None:
                number_of(node, "rank")
            replies = [] if node.get("replies") is None else node["replies"]
            if not isinstance(replies, list):
                raise BadField("replies", f"is {type(replies).__name__}, expected a list")
        except BadField as problem:
            raise problem.inside(where) from None
        for i, reply in enumerate(replies):
            visit(reply, f"{where}.replies[{i}]", path)
        ranked = [reply for reply in replies if reply.get("rank") is not None]
        if path[-1]["role"] == "user" and len(ranked) > 1:
            answers = [reply["text"] for reply in ranked]
            ranks = [float(reply["rank"]) for reply in ranked]
            rankings.append({"prompt": path, "completions": answers, "ranks": ranks})

    visit(row.get("prompt"), "prompt", [])
    return rankings


def _oasst_role(node: Row) -> str:
    roles = {"prompter": "user", "assistant": "assistant"}
    if node.get("role") not in list(roles):
        raise BadField("role", f"is {node.get('role')!r:.40}, expected one of {', '.join(roles)}")
    return roles[node["role"]]


def pair_labels(row: Row) -> list[Row]:
    """Four predictions and six pair labels (Fine-Grained RLHF): 12 13 14 23 24 34; 0 tie, 1 first, 2 second wins.

    The labels are turned into ranks by wins (a tie counts half for each); answers with equal wins tie.
    """
    labels = list_of(row, "preference")
    if len(labels) != 6 or any(isinstance(label, bool) or label not in (0, 1, 2) for label in labels):
        raise BadField("preference", f"is {labels!r:.60}, expected six labels of 0 (tie), 1 or 2")
    wins = [0.0] * 4
    for (i, j), label in zip(itertools.combinations(range(4), 2), labels, strict=True):
        wins[i] += {0: 0.5, 1: 1.0, 2: 0.0}[label]
        wins[j] += {0: 0.5, 1: 0.0, 2: 1.0}[label]
    answers = [text_of(row, f"prediction {i}") for i in range(1, 5)]
    question = filled(row, "question")
    return [{"prompt": user(question), "completions": answers, "ranks": [max(wins) - w for w in wins]}]


def _bare(row: Row, asked: Row) -> list[Row]:
    return [{**{name: value for name, value in row.items() if name not in (*KINDS, "tools")}, **asked}]


def prompts(row: Row) -> list[Row]:
    """A prompt alone; every other column stays in the row, for the reward."""
    return _bare(row, asked_of(row))


def turns(row: Row) -> list[Row]:
    """MT-bench questions: the first of several user turns is the prompt."""
    first = list_of(row, "turns")[0]
    asked = [*system_of(row), *user(filled({"turns[0]": first}, "turns[0]"))]
    return _bare(row, {"prompt": asked, **tools_beside(row)})


def questions(row: Row) -> list[Row]:
    """A question for the user's turn (XSTest calls it prompt); every other column stays in the row."""
    return _bare(row, {"prompt": [*system_of(row), *user(filled(row, "prompt"))], **tools_beside(row)})


def choices(row: Row) -> list[Row]:
    """Multiple choice (MMLU): question, A, B, C, D and the letter of the answer, as a ranking of the four letters."""
    answer = filled(row, "answer")
    if answer not in list("ABCD"):
        raise BadField("answer", f"is {answer!r}, expected A, B, C or D")
    options = "\n".join(f"{letter}. {text_of(row, letter)}" for letter in "ABCD")
    prompt = user(f"{filled(row, 'question')}\n{options}")
    return [{"prompt": prompt, "completions": list("ABCD"), "ranks": [float(letter != answer) for letter in "ABCD"]}]


def text(row: Row) -> list[Row]:
    """Plain text."""
    return [{"text": filled(row, "text")}]


FORMATS: dict[str, Reader] = {
    reader.__name__: reader
    for reader in (
        alpaca, instances, sharegpt, messages, prompt_completion, pairs, hh, oasst, pair_labels, rankings, prompts,
        turns, questions, choices, text, grades, answers, unpaired, preferred, nectar,
    )
}  # fmt: skip

# What tells a format by its columns, the most telling first.
_SIGNS: list[tuple[str, set[str]]] = [
    ("sharegpt", {"conversations"}),
    ("instances", {"instruction", "instances"}),
    ("rankings", {"prompt", "completions", "ranks"}),
    ("rankings", {"prompt", "completions", "shares"}),
    ("rankings", {"prompt", "completions", "scores"}),
    ("nectar", {"prompt", "answers", "good_natured"}),
    ("pair_labels", {"question", "prediction 1", "preference"}),
    ("pairs", {"instruction", "chosen", "rejected"}),
    ("pairs", {"prompt", "chosen", "rejected"}),
    ("pairs", {"chosen", "rejected"}),
    ("alpaca", {"instruction", "output"}),
    ("messages", {"messages"}),
    ("prompt_completion", {"prompt", "completion"}),
    ("choices", {"question", "A", "B", "C", "D", "answer"}),
    ("turns", {"turns"}),
    ("text", {"text"}),
    ("prompts", {"prompt"}),
]


def _is_judged(row: Row) -> bool:
    """Whether a row is one answer with a verdict on it; beside conversations a label of 1 or 0 may be a class."""
    if {"prompt", "completion"} <= set(row) and any(verdict_of(row.get(name)) is not None for name in VERDICTS):
        return True
    demonstrated = {"messages", "conversations", "output"} & set(row)
    return bool(demonstrated) and any(isinstance(row.get(name), bool) for name in VERDICTS)


def recognise(row: Row) -> str:
    """Name the format of a raw row by its columns.

    Raises:
        BadField: no format has these columns.
    """
    columns = set(row)
    if _is_judged(row):
        return "unpaired"
    for name, needs in _SIGNS:
        if not needs <= columns:
            continue
        if name == "pairs" and isinstance(row["chosen"], str) and not columns & {"prompt", "instruction"}:
            return "hh"
        if name == "prompts" and isinstance(row["prompt"], dict):
            return "oasst"
        return name
    raise BadField(
        ", ".join(sorted(columns)) or "(none)",
        f"fits no known format: set `format` to one of {', '.join(FORMATS)}, and `columns` to map names",
    )


# Formats that one file may mix: a row says which it is.
PREFERENCES = ("pairs", "rankings", "unpaired")


def among_preferences(row: Row, first: str) -> str:
    """Name the format of a row in a file of preferences; that of the first row where it tells of no other."""
    try:
        kind = recognise({name: value for name, value in row.items() if value is not None})
    except BadField:
        return first
    return kind if kind in PREFERENCES else first
