"""Prompts of plain text: one user's turn for a chat model, and plain text for a base model.

A text that already holds the marks of the chat template (`<|im_start|>user ...`) is used as it is: the template is not
written around it a second time.
"""

from __future__ import annotations

from functools import cached_property
from typing import Literal

from transformers import PreTrainedTokenizerBase

from lit_align.data.messages import Messages
from lit_align.data.render import Renderer
from lit_align.data.rows import BadField, user

Template = Literal["auto", "none"]
# How a prompt is written: by the tokenizer's or a given template, by the plain one of a tokenizer without, as text, or
# as a text that is in the template already.
Written = Literal["template", "plain template", "text", "as it is"]


class Strings:
    """Decides how a prompt is written.

    Args:
        render: the chat template.
        chat: whether the template is the tokenizer's own or a given one.
        template: auto makes a text one user's turn if there is such a template; none leaves it as text.
    """

    def __init__(self, render: Renderer, chat: bool, template: Template) -> None:
        self.render = render
        self.chat = chat
        self.wraps = chat and template == "auto"

    def __call__(self, prompt: str | Messages, tools: object = None) -> tuple[Written, str | Messages]:
        """How a prompt is written, and the prompt as text or as turns.

        Raises:
            BadField: tools stand beside a text that is in the template already.
        """
        text = prompt if isinstance(prompt, str) else _only_text(prompt)
        if text is not None and self.wraps and self.holds_marks(text, anywhere=isinstance(prompt, str)):
            if tools:
                raise BadField("tools", "stand beside a prompt that is already written in the chat template")
            return "as it is", text
        if isinstance(prompt, str) and not self.wraps:
            return "text", prompt
        turns = user(prompt) if isinstance(prompt, str) else prompt
        return "template" if self.chat else "plain template", turns

    def holds_marks(self, text: str, anywhere: bool) -> bool:
        """Whether a text is in the template: it holds special tokens of turns, or begins and ends as a turn does."""
        tokens, before, behind = self._marks
        begun = text.strip().removeprefix(self._bos).lstrip()
        if any(mark in text if anywhere else begun.startswith(mark) for mark in tokens):
            return True
        return bool(before and behind) and begun.startswith(before) and begun.endswith(behind)

    @property
    def _bos(self) -> str:
        return str(self.render.tokenizer.bos_token or "")

    @cached_property
    def _marks(self) -> tuple[list[str], str, str]:
        """Special tokens that the template writes around a question, and the texts before and behind it."""
        tokenizer: PreTrainedTokenizerBase = self.render.tokenizer
        try:
            before, _, behind = self.render(user("Lorem ipsum"), generation_prompt=True).partition("Lorem ipsum")
        except BadField:
            return [], "", ""
        before = before.removeprefix(self._bos).strip()
        text = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id}
        special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder} - text
        ids = tokenizer(before + behind, add_special_tokens=False)["input_ids"]
        names = (str(tokenizer.convert_ids_to_tokens(token)) for token in ids if token in special)
        return [name for name in dict.fromkeys(names) if name.strip()], before, behind.strip()


def _only_text(messages: Messages) -> str | None:
    """The text of a conversation that is one user's turn."""
    return str(messages[0]["content"]) if len(messages) == 1 and messages[0]["role"] == "user" else None
