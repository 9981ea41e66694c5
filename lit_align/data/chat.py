"""Chat template to tokens, and which of them are scored: the one place where both are decided.

A conversation is tokenised segment by segment, and a segment ends where a model's turn begins or ends. Training then
sees exactly the token sequence that generation produces (the prompt tokenised alone, the answer after it); no token can
straddle the border, and answers to one prompt share it token by token.
"""

from __future__ import annotations

from functools import cached_property
from typing import Literal

from transformers import PreTrainedTokenizerBase

from lit_align.data.rows import BadField
from lit_align.types import Segment

Messages = list[dict[str, str]]
Turns = Literal["all", "last"]

# For tokenizers that come without one. The answer starts with its blank, as byte-level vocabularies like it.
PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    "{{ message['role'].capitalize() + ': ' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


class ChatEncoder:
    """Turns conversations, prompts and answers into token ids.

    Args:
        tokenizer: gets `chat_template`, or the plain one if it has none; export then carries it along.
        chat_template: a Jinja template to use instead of the tokenizer's.
        turns: score every assistant turn of a conversation or the last one only.

    Raises:
        ValueError: no stop token: neither the template nor the tokenizer says where an answer ends.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, chat_template: str | None = None, turns: Turns = "all"
    ) -> None:
        self.tokenizer = tokenizer
        self.turns = turns
        if chat_template is not None:
            tokenizer.chat_template = chat_template
        elif tokenizer.chat_template is None:
            tokenizer.chat_template = PLAIN_TEMPLATE
        if tokenizer.eos_token_id is None and self._template_stop is None:
            raise ValueError(
                "no stop token: the tokenizer has no eos_token and the chat template ends answers with none"
            )

    @property
    def stop_ids(self) -> list[int]:
        """Tokens that end an answer: the template's end of turn, and the tokenizer's end of sequence."""
        stops = [self._template_stop, self.tokenizer.eos_token_id]
        return list(dict.fromkeys(stop for stop in stops if stop is not None))

    def tokens(self, text: str) -> list[int]:
        """Token ids of a piece of text, nothing added."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def text(self, text: str) -> Segment:
        """Plain text as a document: every token scored, the stop token at its end included."""
        ids = self._with_bos(self.tokens(text))
        if self.tokenizer.eos_token_id is not None:
            ids.append(self.tokenizer.eos_token_id)
        return Segment(ids, [False] + [True] * (len(ids) - 1))

    def prompt(self, prompt: str | Messages) -> list[int]:
        """Ids of a prompt: a conversation with the generation prompt after it, or plain text without a template."""
        if isinstance(prompt, str):
            return self._with_bos(self.tokens(prompt))
        return self.tokens(self._render(prompt, generation_prompt=True))

    def answer(self, prompt: str | Messages, answer: str, finished: bool = True) -> Segment:
        """An answer to a prompt: all of it scored, the stop token included if it finished."""
        if isinstance(prompt, str):
            ids = [*self.tokens(answer), self.tokenizer.eos_token_id]
        else:
            before = self._render(prompt, generation_prompt=True)
            after = self._render([*prompt, {"role": "assistant", "content": answer}])
            ids = self._stopped(self._rest(after, before))
        if not finished and len(ids) > 1:
            ids = ids[:-1]
        return Segment(ids, [True] * len(ids))

    def conversation(self, messages: Messages) -> Segment:
        """A conversation: assistant turns are scored (each, or the last), from their first token to the stop token."""
        whole = self._render(messages)
        speaks = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        ids: list[int] = []
        scored: list[bool] = []
        done = 0  # characters of `whole` that are tokenised
        for i in speaks[-1:] if self.turns == "last" else speaks:
            before = self._render(messages[:i], generation_prompt=True)
            after = self._render(messages[: i + 1])
            self._rest(whole, after)
            context, turn = self.tokens(whole[done : len(before)]), self._rest(after, before)
            answer = self._stopped(turn)
            # What the template writes behind the stop token (a line break) is context for the next turn, not scored.
            tail = [] if i == speaks[-1] else self.tokens(turn)[len(answer) :]
            ids += context + answer + tail
            scored += [False] * len(context) + [True] * len(answer) + [False] * len(tail)
            done = len(after)
        return Segment(ids, scored)

    def _render(self, messages: Messages, generation_prompt: bool = False) -> str:
        try:
            return str(
                self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation_prompt)
            )
        except Exception as error:  # a template raises what it likes: jinja's errors, TypeError, ...
            raise BadField("messages", f"does not fit the chat template: {error}") from error

    def _rest(self, text: str, beginning: str) -> str:
        if not text.startswith(beginning):
            raise BadField(
                "messages",
                "are rendered differently by the chat template once an answer follows, so no token sequence of this "
                "conversation is what the model would see: set turns: last, or give a chat_template that only appends",
            )
        return text[len(beginning) :]

    def _stopped(self, turn: str) -> list[int]:
        """Ids of a turn as the model should say it: up to the stop token, which is added if the template has none."""
        ids = self.tokens(turn)
        stop = self._template_stop
        if stop is None:
            return [*self.tokens(turn.rstrip()), self.tokenizer.eos_token_id]
        # The last one: content that spells the stop token must not end the turn early.
        last = len(ids) - 1 - ids[::-1].index(stop) if stop in ids else len(ids) - 1
        return ids[: last + 1]

    @cached_property
    def _template_stop(self) -> int | None:
        """The first special token that the template writes after an answer; None if it writes none."""
        question = {"role": "user", "content": "a"}
        whole = self._render([question, {"role": "assistant", "content": "b"}])
        beginning = self._render([question], generation_prompt=True)
        if not whole.startswith(beginning):
            return None
        special = {*self.tokenizer.all_special_ids, *self.tokenizer.added_tokens_decoder} - {
            self.tokenizer.unk_token_id
        }
        after = self.tokens(whole[len(beginning) :])
        return next((token for token in after if token in special), None)

    def _with_bos(self, ids: list[int]) -> list[int]:
        """Begin with the BOS token where the tokenizer would have added one, and never with two."""
        bos = self.tokenizer.bos_token_id
        adds = bos is not None and self.tokenizer("a")["input_ids"][:1] == [bos]
        return [bos, *ids] if adds and ids[:1] != [bos] else ids
