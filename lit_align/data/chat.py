"""Tokenise chat conversations and decide which tokens are scored. No other file does either.

A conversation is tokenised in segments that end where a model turn begins or ends. Training then sees exactly the
tokens that generation produces: the prompt tokenised alone, and the completion after it. No token crosses that border,
and all completions of a prompt share its tokens.

The stop token is the first special token that the chat template writes after a completion. If it writes none, the
tokenizer's end-of-sequence token is added to every completion.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal

from lightning.pytorch.utilities import rank_zero_info
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lit_align.data.chat_templates import absent_tokens, read_template
from lit_align.data.messages import Message, Messages, Tools, turn_of
from lit_align.data.render import NotAppended, Renderer
from lit_align.data.rows import BadField
from lit_align.data.strings import Strings, Template
from lit_align.types import Segment
from lit_align.utils.model_folder import find_model

Turns = Literal["all", "last"]

# For tokenizers without a template, after a BOS token if the tokenizer adds one. A completion starts with its space, as
# byte-level vocabularies prefer.
PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    "{{ message['role'].capitalize() + ': ' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


class ChatEncoder:
    """Tokenise conversations, prompts and completions.

    Args:
        tokenizer: its template is set to `chat_template`, or to the plain template if it has none; exports include it.
        chat_template: a Jinja template to use instead of the tokenizer's.
        turns: score every assistant turn of a conversation, or only the last one.
        template: auto turns a plain-text prompt into one user turn if there is a chat template other than the plain
            one; none keeps it as text.

    Raises:
        ValueError: the template leaves out content, or neither template nor tokenizer has a stop token.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        chat_template: str | None = None,
        turns: Turns = "all",
        template: Template = "none",
    ) -> None:
        self.tokenizer = tokenizer
        self.turns = turns
        chat = chat_template is not None or tokenizer.chat_template is not None
        if chat_template is not None:
            tokenizer.chat_template = chat_template
        else:
            tokenizer.chat_template = template_of(tokenizer)
        self._render = Renderer(tokenizer)
        self.written = Strings(self._render, chat, template)
        self._template_stop = self._find_stop()
        self._call_stop = self._find_call_stop()
        if not self.stop_ids:
            raise ValueError(
                "no stop token: the tokenizer has no eos_token and the chat template ends answers with none"
            )

    @property
    def stop_ids(self) -> list[int]:
        """Tokens that end a completion: the template's end of turn and of a call, then the tokenizer's EOS."""
        stops = [self._template_stop, self._call_stop, self.tokenizer.eos_token_id]
        return list(dict.fromkeys(stop for stop in stops if stop is not None))

    @property
    def bos(self) -> int | None:
        """Token that the tokenizer puts before text; None if it puts none."""
        return self.tokenizer.bos_token_id if self._begins_text else None

    def tokens(self, text: str) -> list[int]:
        """Token ids of a text, without special tokens added."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def text(self, text: str) -> Segment:
        """Tokenise plain text as a document: every token is scored, the final stop token included."""
        ids = self._with_bos(self._ended(self.tokens(text)))
        return Segment(ids, [False] + [True] * (len(ids) - 1))

    def prompt(self, prompt: str | Messages, tools: Tools | None = None) -> list[int]:
        """Tokenise a prompt: a conversation followed by the generation prompt, or text; see `Strings`.

        Raises:
            BadField: the prompt has no tokens, so nothing could predict the first token of a completion; or the
                template refuses the prompt or leaves part of it out.
        """
        _, prompt = self.written(prompt, tools)
        if isinstance(prompt, str):
            ids = self._with_bos(self.tokens(prompt))
        else:
            text = self._render(prompt, tools, generation_prompt=True)
            self._render.check(text, prompt, tools)
            ids = self.tokens(text)
        if not ids:
            raise BadField("prompt", "comes out as no tokens")
        return ids

    def answer(
        self, prompt: str | Messages, answer: str | Message, finished: bool = True, tools: Tools | None = None
    ) -> Segment:
        """Tokenise a completion: every token is scored, and the stop token too if it finished.

        Args:
            prompt: text, or a conversation.
            answer: text, or a message if it holds tool calls or reasoning.
            finished: False for a completion that was cut at the length limit.
            tools: tools of the conversation.

        Raises:
            BadField: the template refuses the completion or leaves part of it out.
        """
        spelled = isinstance(prompt, str) and isinstance(answer, str)
        how, prompt = self.written(prompt, tools)
        if isinstance(prompt, str):
            if not isinstance(answer, str):
                raise BadField("completion", "has tool calls or reasoning, which text without a template cannot hold")
            stop = self.stop_ids[0 if how == "as it is" else -1]
            ids = self._ended(self.tokens(answer), stop)
        else:
            if spelled and self._template_stop is not None:  # some data sets spell it out
                answer = str(answer).removesuffix(self._spelled(self._template_stop))
            before = self._render(prompt, tools, generation_prompt=True)
            turns = [*prompt, turn_of(answer)]
            after = self._render(turns, tools)
            ids, _ = self._turn(after, before)
            if not isinstance(answer, str):
                self._render.check(after, turns, tools)
                self._render.check_turn(turns, tools)
        if not finished and len(ids) > 1:
            ids = ids[:-1]
        return Segment(ids, [True] * len(ids))

    def conversation(self, messages: Messages, tools: Tools | None = None) -> Segment:
        """Tokenise a conversation. Assistant turns (all, or the last) are scored up to and including the stop token.

        An assistant turn at the very beginning is context, as is one with `train: false`. Everything after the last
        scored turn is left out, because nothing in it is learnt.

        Raises:
            BadField: no turn is scored; the template refuses the conversation or leaves part of it out.
            NotAppended: the template renders a turn differently once another follows; see `conversations`.
        """
        scored_turns = self.scored_turns(messages)
        if not scored_turns:
            raise BadField("messages", "have no assistant turn to train on: each has train: false or weight: 0")
        whole = self._render(messages[: scored_turns[-1] + 1], tools)
        self._render.check(whole, messages[: scored_turns[-1] + 1], tools)
        ids: list[int] = []
        scored: list[bool] = []
        done = 0  # characters of `whole` that are tokenised
        for i in scored_turns:
            before = self._render(messages[:i], tools, generation_prompt=True)
            after = self._render(messages[: i + 1], tools)
            self._check_appends(whole, after)
            answer, length = self._turn(after, before)
            self._render.check_turn(messages[: i + 1], tools)
            context = self._continued(whole[done : len(before)], after_stop=bool(ids))
            ids += context + answer
            scored += [False] * len(context) + [True] * len(answer)
            # Text that the template writes after the stop token (a line break) is context of the next turn.
            done = len(before) + length
        return Segment(ids, [False, *scored[1:]])  # no token precedes the first one to predict it

    def conversations(self, messages: Messages, tools: Tools | None = None) -> list[Segment]:
        """Tokenise a conversation as one sequence or, if needed, one sequence per scored turn.

        Separate sequences are needed if the template renders a turn differently once another follows: Qwen3's drops the
        reasoning of earlier turns. Each sequence then holds what the model would see when it generates that turn.

        Raises:
            BadField: see `conversation`.
        """
        try:
            return [self.conversation(messages, tools)]
        except NotAppended:
            turns = self.scored_turns(messages)
            if len(turns) == 1:
                raise
        single = []
        for i in turns:
            before = self.prompt(messages[:i], tools)
            answer = self.answer(messages[:i], messages[i], tools=tools)
            single.append(Segment([*before, *answer.tokens], [False] * len(before) + list(answer.scored)))
        return single

    def scored_turns(self, messages: Messages) -> list[int]:
        """Indices of the scored turns: assistant turns after another turn, all or the last.

        Empty if each of them is marked as context (`train: false`).

        Raises:
            BadField: no assistant turn follows another turn.
        """
        said = [i for i, message in enumerate(messages) if i and message["role"] == "assistant"]
        if not said:
            raise BadField("messages", "have no assistant turn that answers something")
        return [i for i in (said[-1:] if self.turns == "last" else said) if messages[i].get("train", True)]

    def _check_appends(self, text: str, beginning: str) -> None:
        if not text.startswith(beginning):
            raise NotAppended(
                "messages",
                "are rendered differently by the chat template once an answer follows, so no token sequence of this "
                "conversation is what the model would see: set turns: last, or give a chat_template that only appends",
            )

    def _turn(self, after: str, before: str) -> tuple[list[int], int]:
        """Token ids of a turn as the model should generate it, and the number of characters that they cover.

        The turn ends with the stop token, which is added if the template writes none.
        """
        self._check_appends(after, before)
        turn = after[len(before) :]
        if self._template_stop is None:
            said = turn.rstrip()
            return self._ended(self.tokens(said)), len(said)
        # Take the last stop token: content that spells it must not end the turn early.
        stops = [self._spelled(token) for token in (self._template_stop, self._call_stop) if token is not None]
        said, stop, _ = max((turn.rpartition(stop) for stop in stops), key=lambda parts: len(parts[0] + parts[1]))
        if not stop:
            raise BadField("messages", "are rendered without a stop token behind an answer by the chat template")
        return self.tokens(said + stop), len(said + stop)

    def _continued(self, text: str, after_stop: bool) -> list[int]:
        """Token ids of the text between two completions, as in a prompt that holds both."""
        if not after_stop or self._template_stop is None:
            return self.tokens(text)
        # Some special tokens swallow the spaces after them, so tokenise with the one before and drop it.
        return self.tokens(self._spelled(self._template_stop) + text)[1:]

    def _spelled(self, token: int) -> str:
        return str(self.tokenizer.convert_ids_to_tokens(token))

    def _find_stop(self) -> int | None:
        """First special token that the template writes after a completion; None if it writes none.

        Search after the completion, not after the prompt: a template may put special tokens first (`<think>`).
        """
        said = "Lorem ipsum"
        try:
            whole = self._render([{"role": "user", "content": "Dolor?"}, {"role": "assistant", "content": said}])
        except BadField as problem:
            raise ValueError(f"the chat template cannot write a question and an answer: {problem}") from problem
        if said not in whole:
            raise ValueError(
                f"the chat template does not write what the assistant says, but {whole!r:.80}: it must be a Jinja "
                "template, not the name of one"
            )
        ends = self._ends
        return next((token for token in self.tokens(whole.rpartition(said)[2]) if token in ends), None)

    def _find_call_stop(self) -> int | None:
        """Token that ends a turn with a tool call, if it differs from that of other turns."""
        behind = self._render.after_call()
        if behind is None or self._template_stop is None or self._spelled(self._template_stop) in behind:
            return None
        ends = self._ends
        return next((token for token in reversed(self.tokens(behind)) if token in ends), None)

    @property
    def _ends(self) -> set[int]:
        """Special and added tokens that may end a turn."""
        special = {*self.tokenizer.all_special_ids, *self.tokenizer.added_tokens_decoder}
        # Ignore blank tokens: some vocabularies have runs of spaces and line breaks as added tokens.
        return {token for token in special - {self.tokenizer.unk_token_id} if self._spelled(token).strip()}

    def _ended(self, ids: list[int], stop: int | None = None) -> list[int]:
        """Append a stop token (EOS unless given) if it is not there: some data sets spell it out."""
        end = self.stop_ids[-1] if stop is None else stop
        return ids if ids[-1:] == [end] else [*ids, end]

    def _with_bos(self, ids: list[int]) -> list[int]:
        """Prepend the BOS token if the tokenizer would add one and it is not there."""
        bos = self.tokenizer.bos_token_id
        return [bos, *ids] if self._begins_text and ids[:1] != [bos] else ids

    @cached_property
    def _begins_text(self) -> bool:
        return begins_text(self.tokenizer)


def load_encoder(
    name: str | PreTrainedTokenizerBase,
    chat_template: str | None,
    turns: Turns,
    template: Template,
    trust_remote_code: bool,
    revision: str | None,
    new_tokens: Sequence[str] = (),
) -> ChatEncoder:
    """Load the encoder of a folder or a hub name; see `TextDataModule`.

    `new_tokens` are special tokens to add if the tokenizer lacks them. `chat_template` is a name, a file or Jinja text;
    see `read_template`.

    Raises:
        ValueError: the tokenizer does not exist, or `ChatEncoder` refuses it.
    """
    if isinstance(name, str):
        tokenizer = _load_tokenizer(name, trust_remote_code, revision)
    else:
        tokenizer = copy.deepcopy(name)
    if lacking := [token for token in dict.fromkeys(new_tokens) if token not in tokenizer.get_vocab()]:
        tokenizer.add_tokens(lacking, special_tokens=True)
    given = None if chat_template is None else read_template(chat_template)
    encoder = ChatEncoder(tokenizer, given, turns, template)
    if given is not None and (absent := absent_tokens(given, tokenizer)):
        rank_zero_info(
            f"the tokenizer has no tokens {', '.join(absent)}: data.chat_template writes them as ordinary text, and "
            f"answers end with {tokenizer.convert_ids_to_tokens(encoder.stop_ids[0])}; zephyr needs none of them"
        )
    return encoder


def _load_tokenizer(name: str, trust_remote_code: bool, revision: str | None) -> PreTrainedTokenizerBase:
    name = find_model(name)
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code, revision=revision)
    except (MemoryError, ImportError):
        raise
    except Exception as error:  # a damaged config.json or tokenizer.json raises anything
        if os.path.isdir(name):
            said = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(
                f"data.tokenizer: the folder {name!r} cannot be read as a tokenizer: {said:.300}"
            ) from error
        raise ValueError(
            f"data.tokenizer: {name!r} is neither a folder here nor a model of the hub that can be reached; "
            f"if an earlier stage writes it, run that first ({str(error).splitlines()[0]})"
        ) from error


def template_of(tokenizer: PreTrainedTokenizerBase) -> Any:
    """Chat template of the tokenizer, or the plain template if it has none."""
    if tokenizer.chat_template is not None:
        return tokenizer.chat_template
    return ("{{ bos_token }}" if begins_text(tokenizer) else "") + PLAIN_TEMPLATE


def begins_text(tokenizer: PreTrainedTokenizerBase) -> bool:
    """True if the tokenizer puts a BOS token before text."""
    bos = tokenizer.bos_token_id
    return bos is not None and tokenizer("a")["input_ids"][:1] == [bos]
