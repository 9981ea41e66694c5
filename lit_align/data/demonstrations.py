"""Readers of demonstrations: instructions with an answer, conversations, prompts with a completion."""

from __future__ import annotations

from lit_align.data.messages import (
    Message,
    Messages,
    answer_of,
    asked_of,
    history_of,
    message_of,
    messages_of,
    system_of,
    tools_of,
    with_system,
)
from lit_align.data.rows import BadField, Row, filled, list_of, text_of, user


def _instruction(row: Row) -> str:
    """Instruction and optional input, as one user turn."""
    instruction, extra = filled(row, "instruction"), text_of(row, "input", default="")
    return f"{instruction}\n\n{extra}" if extra.strip() else instruction


def question_of(row: Row) -> Messages:
    """The instruction as a conversation, behind a system column and the turns of a history column."""
    return [*system_of(row), *history_of(row), *user(_instruction(row))]


def tools_beside(row: Row) -> Row:
    """The tools of a row, where it has any."""
    tools = tools_of(row)
    return {"tools": tools} if tools else {}


def alpaca(row: Row) -> list[Row]:
    """Stanford Alpaca: instruction, optional input, output; optional system, history (context) and tools."""
    return [{"prompt": question_of(row), "completion": filled(row, "output"), **tools_beside(row)}]


def instances(row: Row) -> list[Row]:
    """Self-Instruct seed tasks: one instruction with several instances of input and output."""
    rows = []
    for i, instance in enumerate(list_of(row, "instances")):
        if not isinstance(instance, dict):
            raise BadField(f"instances[{i}]", f"is {type(instance).__name__}, expected input and output")
        instruction = {"instruction": row["instruction"]} if "instruction" in row else {}
        try:
            rows += alpaca({**instruction, **instance})
        except BadField as problem:
            raise problem if problem.field == "instruction" else problem.inside(f"instances[{i}]") from None
    return rows


# Who speaks in ShareGPT's conversations; the last two are LLaMA-Factory's names.
_SPEAKERS = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_SPEAKERS |= {"tool": "tool", "observation": "tool", "function_call": "assistant"}


def sharegpt(row: Row) -> list[Row]:
    """ShareGPT: conversations of {"from": human | gpt | system | tool, "value"}; optional system and tools."""
    turns = []
    for i, turn in enumerate(list_of(row, "conversations")):
        where = f"conversations[{i}]"
        if not isinstance(turn, dict):
            raise BadField(where, f"is {type(turn).__name__}, expected a turn with from and value")
        speaker = turn.get("from")
        if not isinstance(speaker, str) or speaker not in _SPEAKERS:
            raise BadField(f"{where}.from", f"is {speaker!r:.40}, expected one of {', '.join(_SPEAKERS)}")
        try:
            turns.append(_called(turn) if speaker == "function_call" else message_of(turn, _SPEAKERS[speaker], "value"))
        except BadField as problem:
            raise problem.inside(where) from None
    return _conversation(row, turns, "conversations")


def _called(turn: Row) -> Message:
    """A turn whose value is a tool call as JSON text."""
    message = message_of(turn, "assistant", "value")
    return message_of({**message, "content": "", "function_call": message["content"]}, "assistant")


def messages(row: Row) -> list[Row]:
    """OpenAI chat: messages of {"role", "content"}, optional tools; something must be said by the assistant."""
    return _conversation(row, messages_of(row, "messages"), "messages")


def _conversation(row: Row, turns: Messages, field: str) -> list[Row]:
    said = [turn for turn in turns if turn["role"] == "assistant"]
    if not any(turn["content"].strip() or "tool_calls" in turn for turn in said):
        raise BadField(field, "has no assistant turn with text, so there is nothing to learn")
    return [{"messages": with_system(row, turns), **tools_beside(row)}]


def prompt_completion(row: Row) -> list[Row]:
    """A prompt (text, or a conversation) and its completion.

    The completion may be several turns: the assistant's, with results of tools between them.
    """
    asked = asked_of(row, row.get("completion"))
    if isinstance(row.get("completion"), list) and len(row["completion"]) > 1:
        turns = messages_of(row, "completion")
        roles = [turn["role"] for turn in turns]
        if roles[0] == roles[-1] == "assistant" and set(roles) <= {"assistant", "tool"}:
            prompt = asked.pop("prompt")
            return [{"messages": [*_as_context(prompt), *turns], **asked}]
    return [{**asked, "completion": answer_of(row, "completion", empty=False)}]


def _as_context(prompt: str | Messages) -> Messages:
    """A prompt as turns of which none is trained on."""
    turns = user(prompt) if isinstance(prompt, str) else prompt
    return [{**turn, "train": False} if turn["role"] == "assistant" else turn for turn in turns]
