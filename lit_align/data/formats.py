"""Public formats, each a small reader from a raw row to rows of the one schema (`data/rows.py`).

A reader takes a raw row as its file has it and returns the rows it holds: mostly one, several for a tree or a task with
many instances. Other column names are mapped before (`Source.columns`), so a reader knows only its own.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

from lit_align.data.rows import BadField, Row, filled, list_of, messages_of, prompt_of, text_of, user

Reader = Callable[[Row], list[Row]]


def _instruction(row: Row) -> str:
    """Instruction and optional input, as one user turn."""
    instruction, extra = filled(row, "instruction"), text_of(row, "input", default="")
    return f"{instruction}\n\n{extra}" if extra.strip() else instruction


def alpaca(row: Row) -> list[Row]:
    """Stanford Alpaca: instruction, optional input, output."""
    return [{"prompt": user(_instruction(row)), "completion": filled(row, "output")}]


def instances(row: Row) -> list[Row]:
    """Self-Instruct seed tasks: one instruction with several instances of input and output."""
    rows = []
    for i, instance in enumerate(list_of(row, "instances")):
        if not isinstance(instance, dict):
            raise BadField(f"instances[{i}]", f"is {type(instance).__name__}, expected input and output")
        rows += alpaca({"instruction": row.get("instruction"), **instance})
    return rows


def sharegpt(row: Row) -> list[Row]:
    """ShareGPT: conversations of {"from": human | gpt | system, "value"}."""
    roles = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
    turns = []
    for i, turn in enumerate(list_of(row, "conversations")):
        speaker = turn.get("from") if isinstance(turn, dict) else None
        if speaker not in roles:
            raise BadField(f"conversations[{i}].from", f"is {speaker!r}, expected one of {', '.join(roles)}")
        turns.append({"role": roles[speaker], "content": turn.get("value")})
    return messages({"messages": turns})


def messages(row: Row) -> list[Row]:
    """OpenAI chat: messages of {"role", "content"}; something must be said by the assistant."""
    turns = messages_of(row, "messages")
    if not any(turn["role"] == "assistant" and turn["content"].strip() for turn in turns):
        raise BadField("messages", "has no assistant turn with text, so there is nothing to learn")
    return [{"messages": turns}]


def prompt_completion(row: Row) -> list[Row]:
    """A prompt (text, or a conversation) and its completion; plain text gets no chat template."""
    return [{"prompt": prompt_of(row), "completion": _completion(row, "completion", empty=False)}]


def _completion(row: Row, field: str, empty: bool = True) -> str:
    """An answer as text; a list of one assistant message (TRL's conversational form) is taken apart."""
    if isinstance(row.get(field), list):
        turns = messages_of(row, field)
        if len(turns) != 1 or turns[0]["role"] != "assistant":
            raise BadField(field, f"has {len(turns)} turns, expected one by the assistant")
        row = {field: turns[0]["content"]}
    return text_of(row, field) if empty else filled(row, field)


def _pair(prompt: str | list[dict[str, str]], chosen: str, rejected: str, margin: float | None = None) -> list[Row]:
    row: Row = {"prompt": prompt, "completions": [chosen, rejected], "ranks": [0.0, 1.0]}
    return [row if margin is None else {**row, "margins": [margin, 0.0]}]


def pairs(row: Row) -> list[Row]:
    """Preference pairs: prompt (or Alpaca's instruction and input), chosen, rejected, optional margin.

    Without a prompt column the two are whole conversations that differ in the last turn (UltraFeedback, TRL's implicit
    prompt).
    """
    margin = row.get("margin")
    if margin is not None and (isinstance(margin, bool) or not isinstance(margin, (int, float))):
        raise BadField("margin", f"is {type(margin).__name__}, expected a number")
    if row.get("prompt") is None and row.get("instruction") is None:
        chosen, rejected = messages_of(row, "chosen"), messages_of(row, "rejected")
        if chosen[:-1] != rejected[:-1]:
            raise BadField("rejected", "answers another conversation than chosen: their earlier turns differ")
        prompt = prompt_of({"prompt": chosen[:-1]})
        return _pair(prompt, _completion({"c": chosen[-1:]}, "c"), _completion({"c": rejected[-1:]}, "c"), margin)
    prompt = user(_instruction(row)) if row.get("prompt") is None else prompt_of(row)
    return _pair(prompt, _last_turn(row, "chosen"), _last_turn(row, "rejected"), margin)


def _last_turn(row: Row, field: str) -> str:
    """The answer; of a whole conversation (UltraFeedback has those beside its prompt column) the last turn."""
    value = row.get(field)
    return _completion({field: value[-1:]} if isinstance(value, list) and len(value) > 1 else row, field)


def hh(row: Row) -> list[Row]:
    r"""Anthropic HH-RLHF: chosen and rejected as flat strings of "\n\nHuman: ..." and "\n\nAssistant: ..." turns."""
    turns = {}
    for field in ("chosen", "rejected"):
        turns[field] = _hh_turns(field, filled(row, field))
    if turns["chosen"][:-1] != turns["rejected"][:-1]:
        raise BadField("rejected", "answers another conversation than chosen: their earlier turns differ")
    return _pair(turns["chosen"][:-1], turns["chosen"][-1]["content"], turns["rejected"][-1]["content"])


def _hh_turns(field: str, text: str) -> list[dict[str, str]]:
    turns = []
    for part in text.split("\n\nHuman:")[1:]:
        question, *answers = part.split("\n\nAssistant:")
        turns.append({"role": "user", "content": question.strip()})
        turns += [{"role": "assistant", "content": answer.strip()} for answer in answers]
    if len(turns) < 2 or turns[-1]["role"] != "assistant":
        raise BadField(
            field, 'is not a dialogue of "\\n\\nHuman:" and "\\n\\nAssistant:" turns that the assistant ends'
        )
    return turns


def oasst(row: Row) -> list[Row]:
    """OpenAssistant message trees: every prompter turn whose replies people ranked becomes one ranking."""
    rankings: list[Row] = []

    def visit(node: Row, path: list[dict[str, str]]) -> None:
        role = "user" if node.get("role") == "prompter" else "assistant"
        path = [*path, {"role": role, "content": text_of(node, "text")}]
        replies = node.get("replies") or []
        ranked = [reply for reply in replies if reply.get("rank") is not None]
        if role == "user" and len(ranked) > 1:
            answers = [text_of(reply, "text") for reply in ranked]
            rankings.append({"prompt": path, "completions": answers, "ranks": [float(r["rank"]) for r in ranked]})
        for reply in replies:
            visit(reply, path)

    root = row.get("prompt")
    if not isinstance(root, dict):
        raise BadField("prompt", f"is {type(root).__name__}, expected the root message of a tree")
    visit(root, [])
    return rankings


def pair_labels(row: Row) -> list[Row]:
    """Four predictions and six pair labels (Fine-Grained RLHF): 12 13 14 23 24 34; 0 tie, 1 first, 2 second wins.

    The labels are turned into ranks by wins (a tie counts half for each); answers with equal wins tie.
    """
    labels = list_of(row, "preference")
    if len(labels) != 6 or any(label not in (0, 1, 2) for label in labels):
        raise BadField("preference", f"is {labels!r:.60}, expected six labels of 0 (tie), 1 or 2")
    wins = [0.0] * 4
    for (i, j), label in zip(itertools.combinations(range(4), 2), labels, strict=True):
        wins[i] += {0: 0.5, 1: 1.0, 2: 0.0}[label]
        wins[j] += {0: 0.5, 1: 0.0, 2: 1.0}[label]
    answers = [text_of(row, f"prediction {i}") for i in range(1, 5)]
    question = filled(row, "question")
    return [{"prompt": user(question), "completions": answers, "ranks": [max(wins) - w for w in wins]}]


def rankings(row: Row) -> list[Row]:
    """A prompt, K completions and their ranks: lower is better, equal is a tie.

    Sampled answers may come with `finished`: one that was cut for want of room gets no stop token.
    """
    answers, ranks = list_of(row, "completions"), list_of(row, "ranks")
    if len(answers) != len(ranks):
        raise BadField("ranks", f"has {len(ranks)} entries for {len(answers)} completions")
    if len(answers) < 2:
        raise BadField("completions", "has one answer, which leaves nothing to compare")
    for i, rank in enumerate(ranks):
        if isinstance(rank, bool) or not isinstance(rank, (int, float)) or rank != rank:
            raise BadField(f"ranks[{i}]", f"is {rank!r}, expected a number")
    texts = [_completion({f"completions[{i}]": a}, f"completions[{i}]") for i, a in enumerate(answers)]
    ranked: Row = {"prompt": prompt_of(row), "completions": texts, "ranks": [float(rank) for rank in ranks]}
    finished = row.get("finished")
    if finished is None:
        return [ranked]
    if (
        not isinstance(finished, list)
        or len(finished) != len(answers)
        or any(not isinstance(f, bool) for f in finished)
    ):
        raise BadField("finished", f"must be a list of {len(answers)} times true or false, one per completion")
    return [{**ranked, "finished": finished}]


def prompts(row: Row) -> list[Row]:
    """A prompt alone; every other column stays in the row, for the reward."""
    return [{**row, "prompt": prompt_of(row)}]


def turns(row: Row) -> list[Row]:
    """MT-bench questions: the first of several user turns is the prompt."""
    first = list_of(row, "turns")[0]
    return [{**row, "prompt": user(filled({"turns[0]": first}, "turns[0]"))}]


def questions(row: Row) -> list[Row]:
    """A question for the user's turn (XSTest calls it prompt); every other column stays in the row."""
    return [{**row, "prompt": user(filled(row, "prompt"))}]


def choices(row: Row) -> list[Row]:
    """Multiple choice (MMLU): question, A, B, C, D and the letter of the answer, as a ranking of the four letters."""
    answer = filled(row, "answer")
    if answer not in "ABCD":
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
        turns, questions, choices, text,
    )
}  # fmt: skip

# What tells a format by its columns, the most telling first.
_SIGNS: list[tuple[str, set[str]]] = [
    ("sharegpt", {"conversations"}),
    ("instances", {"instruction", "instances"}),
    ("rankings", {"prompt", "completions", "ranks"}),
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


def recognise(row: Row) -> str:
    """Name the format of a raw row by its columns.

    Raises:
        BadField: no format has these columns.
    """
    columns = set(row)
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
