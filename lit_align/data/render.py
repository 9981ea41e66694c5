"""A conversation as the text that a chat template writes, and what a template leaves out.

A template that does not know a key ignores it without an error. So whatever a message holds is rendered with and
without: where both come out the same, the row is refused.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

from lightning.pytorch.utilities import rank_zero_info
from transformers import PreTrainedTokenizerBase

from lit_align.data.messages import REASONING, Message, Messages, Tools
from lit_align.data.rows import BadField
from lit_align.utils.bounds import at_most

_CALL = {"type": "function", "id": "call00000", "function": {"name": "lookup", "arguments": {"word": "Loremipsum"}}}
WAY_OUT = "change the row, or set data.chat_template to a template that takes it (a name, as qwen3, or a file)"


class NotAppended(BadField):
    """A turn that is rendered differently once another follows."""


class Renderer:
    """A tokenizer's chat template.

    Args:
        tokenizer: with its `chat_template`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer

    def __call__(self, messages: Messages, tools: Tools | None = None, generation_prompt: bool = False) -> str:
        """The text of a conversation, with the beginning of an answer behind it if asked for.

        Raises:
            BadField: the template refuses it.
        """
        plain = [self._plain(message) for message in messages]
        options = {"tokenize": False, "add_generation_prompt": generation_prompt}
        try:
            with at_most():
                return str(self.tokenizer.apply_chat_template(plain, tools=tools or None, **options))  # type: ignore[arg-type]
        except MemoryError as error:
            raise BadField("messages", f"takes too much memory in the chat template ({WAY_OUT})") from error
        except Exception as error:  # a template raises what it likes: jinja's errors, TypeError, ...
            problem = f"does not fit the chat template: {error}"
            raise BadField("messages", f"{problem} ({WAY_OUT})") from error

    def _plain(self, message: Message) -> Message:
        """A message under the names that the template reads."""
        if message["role"] == "developer" and not self._knows_developer:
            message = {**message, "role": "system"}
        if "reasoning_content" in message and self._reasoning != "reasoning_content":
            message = {**message, self._reasoning: message["reasoning_content"]}
        return {name: value for name, value in message.items() if name != "train"}

    @cached_property
    def _knows_developer(self) -> bool:
        """Whether the template writes the role `developer`; otherwise such turns are the system's."""
        self.__dict__["_knows_developer"] = True  # while the template is asked
        try:
            known = "Lorem" in self([{"role": "developer", "content": "Lorem"}, {"role": "user", "content": "Dolor?"}])
        except BadField:
            known = False
        if not known:
            rank_zero_info("the chat template has no developer role: such turns are rendered as the system's")
        return known

    @cached_property
    def _reasoning(self) -> str:
        """The name under which the template reads an assistant's thoughts; the first where it reads none."""
        asked = {"role": "user", "content": "Dolor?"}
        for name in REASONING:
            said = {"role": "assistant", "content": "Amet", name: "Loremipsum"}
            try:
                with at_most():
                    text = str(self.tokenizer.apply_chat_template([asked, said], tokenize=False))
                if "Loremipsum" in text:
                    return name
            except Exception:  # see __call__
                continue
        return REASONING[0]

    def after_call(self) -> str | None:
        """What the template writes behind a call's arguments; None where it writes no calls."""
        asked = {"role": "user", "content": "Dolor?"}
        try:
            text = self([asked, {"role": "assistant", "content": "", "tool_calls": [_CALL]}])
        except BadField:
            return None
        return text.rpartition("Loremipsum")[2] if "Loremipsum" in text else None

    # What a template leaves out.

    def check(self, text: str, messages: Messages, tools: Tools | None) -> None:
        """Refuse a conversation of which the template leaves something out.

        Args:
            text: as it was rendered.
            messages: the conversation.
            tools: beside it.

        Raises:
            BadField: names what is left out, and the way out.
        """
        if tools and self(messages) == self(messages, tools):
            raise BadField("tools", f"is ignored by the chat template: {WAY_OUT}")
        whole = _in_order(text, [message["content"].strip() for message in messages])
        for i, message in enumerate(messages):
            if not whole and message["content"].strip() and self._same(messages, tools, i, content="Lorem ipsum"):
                raise _ignored(i, f"content of the role {message['role']}")
            if "tool_calls" in message and self._same(messages, tools, i, tool_calls=None):
                raise _ignored(i, "tool_calls")

    def check_turn(self, messages: Messages, tools: Tools | None) -> None:
        """Refuse a last turn whose reasoning the template leaves out.

        Raises:
            BadField: see `check`.
        """
        last = len(messages) - 1
        if "reasoning_content" in messages[-1] and self._same(messages, tools, last, reasoning_content=None):
            raise _ignored(last, "reasoning_content")

    def _same(self, messages: Messages, tools: Tools | None, i: int, **other: Any) -> bool:
        """Whether another value of a message's field, or its absence, changes nothing."""
        changed = {name: value for name, value in {**messages[i], **other}.items() if value is not None}
        try:
            return self([*messages[:i], changed, *messages[i + 1 :]], tools) == self(messages, tools)
        except BadField:  # the template looks at it
            return False


def _in_order(text: str, pieces: list[str]) -> bool:
    """Whether a text holds each piece, one behind the other."""
    at = 0
    for piece in pieces:
        found = text.find(piece, at)
        if found < 0:
            return False
        at = found + len(piece)
    return True


def _ignored(i: int, what: str) -> BadField:
    return BadField(f"messages[{i}]", f"has {what}, which the chat template ignores: {WAY_OUT}")
