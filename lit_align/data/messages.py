"""Conversations: each turn is checked and carried whole, as a chat template takes it.

A message holds `role` and `content` (text), and what else the row says of it: `tool_calls`, `tool_call_id`, `name`,
`reasoning_content`. `train: false` marks an assistant turn that is context. A null is an absent key: `datasets` fills
the keys that other rows have with nulls.
"""

from __future__ import annotations

import json
from typing import Any

from lit_align.data.rows import BadField, Row, filled, list_of, text_of, user

Message = dict[str, Any]
Messages = list[Message]
Tools = list[dict[str, Any]]

ROLES = ("system", "user", "assistant", "tool", "developer")
# Names that data sets give to an assistant's thoughts. A message calls them by the first.
REASONING = ("reasoning_content", "reasoning", "thinking")
# Names that data sets give to the choice whether a turn is trained on.
TRAINED = ("train", "training", "weight", "loss")
_TEXT_PARTS = ("text", "input_text", "output_text")
_SYSTEM = ("system", "system_prompt")


def messages_of(row: Row, field: str) -> Messages:
    """The conversation in a field, checked turn by turn.

    Raises:
        BadField: a turn without a known role, without text and tool calls, or with a part that is not text.
    """
    messages = []
    for i, turn in enumerate(list_of(row, field)):
        where = f"{field}[{i}]"
        if not isinstance(turn, dict):
            raise BadField(where, f"is {type(turn).__name__}, expected a message with role and content")
        role = "tool" if turn.get("role") == "function" else turn.get("role")
        if role not in ROLES:
            raise BadField(f"{where}.role", f"is {role!r:.40}, expected one of {', '.join(ROLES)}")
        try:
            messages.append(message_of(turn, role))
        except BadField as problem:
            raise problem.inside(where) from None
    return messages


def message_of(turn: Row, role: str, content: str = "content") -> Message:
    """A turn as a message.

    Args:
        turn: the row's turn.
        role: one of `ROLES`.
        content: the field that holds the text.

    Raises:
        BadField: no text where there must be some, or a field of the wrong kind.
    """
    calls = calls_of(turn) if role == "assistant" else []
    said, thoughts = _content(turn, content, empty=bool(calls))
    message: Message = {"role": role, "content": said}
    if role == "assistant":
        named = next((text_of(turn, name) for name in REASONING if turn.get(name) not in (None, "")), None)
        if thoughts or named:
            message["reasoning_content"] = named or thoughts
        if calls:
            message["tool_calls"] = calls
        if not is_trained(turn):
            message["train"] = False
    for name in ("tool_call_id", "name"):
        if turn.get(name) not in (None, ""):
            message[name] = text_of(turn, name)
    return message


def _content(turn: Row, field: str, empty: bool) -> tuple[str, str]:
    """Text and thoughts of a turn, whose content is text or a list of parts."""
    value = turn.get(field)
    if value is None and empty:
        return "", ""
    if not isinstance(value, list):
        return text_of(turn, field), ""
    said = {"text": "", "thinking": ""}
    for i, part in enumerate(value):
        where = f"{field}[{i}]"
        if isinstance(part, str):
            said["text"] += text_of({where: part}, where)
            continue
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind in _TEXT_PARTS or kind in ("thinking", "reasoning"):
            is_text = kind in _TEXT_PARTS
            name = kind if kind in part and not is_text else "text"
            said["text" if is_text else "thinking"] += text_of({f"{where}.{name}": part.get(name)}, f"{where}.{name}")
            continue
        raise BadField(where, f"is of type {kind!r:.40}: only parts of text are read, no images and no audio")
    return said["text"], said["thinking"]


def is_trained(turn: Row) -> bool:
    """Whether a turn of the assistant is trained on: unless its `train` is false or its `weight` is 0.

    Raises:
        BadField: a weight between.
    """
    for name in TRAINED:
        value = turn.get(name)
        if value is None:
            continue
        if value not in (0, 1):  # False and True among them
            raise BadField(name, f"is {value!r:.40}: a turn is trained on (true or 1) or is context (false or 0)")
        if not value:
            return False
    return True


def calls_of(turn: Row) -> list[dict[str, Any]]:
    """Tool calls of a turn, in OpenAI's form; the arguments of each are a dictionary.

    Raises:
        BadField: a call without a name, or arguments that are no JSON object.
    """
    given = loaded(turn, "tool_calls")
    if given is None and turn.get("function_call") is not None:
        given = [loaded(turn, "function_call")]
    if given is None:
        return []
    if not isinstance(given, list):
        raise BadField("tool_calls", f"is {type(given).__name__}, expected a list of calls")
    return [call_of(call, f"tool_calls[{i}]") for i, call in enumerate(given)]


def call_of(call: object, where: str) -> dict[str, Any]:
    """One tool call: {"type": "function", "function": {"name", "arguments"}}, and `id` if it has one.

    Raises:
        BadField: see `calls_of`.
    """
    inner = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(call, dict) or not isinstance(inner, dict):
        raise BadField(where, f"is {call!r:.60}, expected a call with a name and arguments")
    try:
        name = filled(inner, "name")
        arguments = loaded(inner, "arguments")
        if arguments is None:
            arguments = {}
        if not isinstance(arguments, dict):
            raise BadField("arguments", f"is {arguments!r:.60}, expected a JSON object")
    except BadField as problem:
        raise problem.inside(f"{where}.function" if "function" in call else where) from None
    number = {"id": call["id"]} if call.get("id") is not None else {}
    return {**number, "type": "function", "function": {"name": name, "arguments": arguments}}


def tools_of(row: Row, field: str = "tools") -> Tools:
    """Schemas of the tools in a field: a list of them, as such or as JSON text.

    Raises:
        BadField: not such a list.
    """
    given = loaded(row, field)
    if given is None or given == "":
        return []
    if not isinstance(given, list) or not all(isinstance(tool, dict) for tool in given):
        raise BadField(field, f"is {given!r:.60}, expected a list of tools, each with name, description and parameters")
    return [tool if "function" in tool else {"type": "function", "function": tool} for tool in given]


def loaded(row: Row, field: str) -> Any:
    """A value that may be given as JSON text: text is parsed and kept as it is, of other values nulls are left out.

    Raises:
        BadField: text that is no JSON.
    """
    value = row.get(field)
    if not isinstance(value, str):
        return without_nulls(value)
    if not value.strip():
        return None
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise BadField(field, f"is text that is not valid JSON ({error}): {value!r:.60}") from None


def without_nulls(value: Any) -> Any:
    """The same value without the keys whose value is null, at any depth."""
    if isinstance(value, dict):
        return {key: without_nulls(held) for key, held in value.items() if held is not None}
    return [without_nulls(held) for held in value] if isinstance(value, list) else value


def system_of(row: Row) -> Messages:
    """The system message that a column beside the conversation holds, if there is one.

    Raises:
        BadField: not text.
    """
    for field in _SYSTEM:
        if row.get(field) is not None and text_of(row, field).strip():
            return [{"role": "system", "content": text_of(row, field)}]
    return []


def with_system(row: Row, messages: Messages) -> Messages:
    """A conversation behind the system message of a column.

    Raises:
        BadField: both have a system message, and another one.
    """
    system = system_of(row)
    if not system or messages[0]["role"] not in ("system", "developer"):
        return system + messages
    if messages[0]["content"].strip() != system[0]["content"].strip():
        field = next(name for name in _SYSTEM if row.get(name) is not None)
        raise BadField(
            field, "differs from the system message that the conversation begins with: leave one of them out"
        )
    return messages


def history_of(row: Row) -> Messages:
    """Earlier turns in a column `history` of [question, answer] pairs (LLaMA-Factory); they are context.

    Raises:
        BadField: not such a list.
    """
    turns: Messages = []
    if row.get("history") is None:
        return turns
    if not isinstance(row["history"], list):
        raise BadField("history", f"is {type(row['history']).__name__}, expected a list of [question, answer]")
    for i, pair in enumerate(row["history"]):
        where = f"history[{i}]"
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise BadField(where, f"is {pair!r:.40}, expected [question, answer]")
        question, answer = (text_of({where: text}, where) for text in pair)
        turns += [*user(question), {"role": "assistant", "content": answer}]
    return turns


def prompt_of(row: Row, field: str = "prompt") -> str | Messages:
    """A prompt: text, or a conversation that ends before the assistant speaks. A system column comes before it.

    Raises:
        BadField: missing, empty, or ending with the assistant.
    """
    if not isinstance(row.get(field), list):
        text, before = filled(row, field), [*system_of(row), *history_of(row)]
        return [*before, *user(text)] if before else text
    messages = with_system(row, messages_of(row, field))
    if not any(message["content"].strip() for message in messages):
        raise BadField(field, "is empty: none of its messages has text")
    if messages[-1]["role"] == "assistant":
        raise BadField(field, "ends with an assistant turn, which is an answer and not a prompt")
    return messages


def asked_of(row: Row, *answers: object) -> Row:
    """What a row asks: its `prompt`, and `tools` where it has any.

    A prompt of text becomes a user's turn where the answers to it are turns of the assistant, or where tools are given:
    only a chat template writes those.
    """
    tools, prompt = tools_of(row), prompt_of(row)
    if isinstance(prompt, str) and (tools or any(isinstance(answer, list) for answer in answers)):
        prompt = user(prompt)
    return {"prompt": prompt, **({"tools": tools} if tools else {})}


def answer_of(row: Row, field: str, empty: bool = True) -> str | Message:
    """An answer: text, or a message where it holds more than text (tool calls, reasoning).

    A list of one assistant message (TRL's conversational form) is taken apart.

    Raises:
        BadField: not text, another conversation, or blank where it must say something.
    """
    if isinstance(row.get(field), list):
        turns = messages_of(row, field)
        if len(turns) != 1 or turns[0]["role"] != "assistant":
            raise BadField(field, f"has {len(turns)} turns, expected one by the assistant")
        return answer_in(turns[0], field, empty)
    return text_of(row, field) if empty else filled(row, field)


def answer_in(message: Message, field: str, empty: bool = True) -> str | Message:
    """What a turn of the assistant answers: its text, or the whole message where it holds more.

    Raises:
        BadField: blank where it must say something.
    """
    if "tool_calls" in message or "reasoning_content" in message:
        return {name: value for name, value in message.items() if name != "train"}
    if not empty and not message["content"].strip():
        raise BadField(field, "is empty")
    return str(message["content"])


def turn_of(answer: str | Message) -> Message:
    """The assistant's turn that an answer is."""
    return {"role": "assistant", "content": answer} if isinstance(answer, str) else answer


def says_nothing(answer: str | Message) -> bool:
    """Whether an answer is blank: no text, no tool call."""
    return not answer.strip() if isinstance(answer, str) else not (answer["content"].strip() or "tool_calls" in answer)
