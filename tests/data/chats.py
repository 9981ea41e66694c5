"""Tokenizers that speak several chat templates, and a way to see what is scored.

Every vocabulary is the 256 bytes and special tokens, so that a reader can count tokens.
"""

from __future__ import annotations

from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from lit_align.models.scratch import bpe_tokenizer
from lit_align.types import Example, Segment

BYTES = 256 + 7

# The turn ends with <|im_end|>, while the tokenizer's eos is another token; no BOS anywhere.
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Writes BOS itself and trims what is said.
LLAMA3 = (
    "{% for message in messages %}"
    "{% if loop.first %}{{ bos_token }}{% endif %}"
    "{{ '<|start|>' + message['role'] + '<|end|>\n\n' + message['content'] | trim + '<|eot|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant<|end|>\n\n' }}{% endif %}"
)
# Like Qwen3's: the last answer is rendered with its (empty) thoughts, and loses them once another turn follows.
THINKING = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' and loop.last %}{{ '<think></think>' }}{% endif %}"
    "{{ message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Says nowhere that an answer ends.
STOPLESS = (
    "{% for message in messages %}{{ message['role'][0].upper() + ': ' + message['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'A:' }}{% endif %}"
)
# Says it, and is picky as Gemma's: no system, and turns that take turns.
STRICT = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate') }}{% endif %}"
    "{{ '<|start|>' + message['role'] + '\n' + message['content'] + '<|end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)


# Qwen3's own: tools, tool calls and thoughts; drops the thoughts of turns before the last question.
QWEN3 = r"""{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\n\n' }}{%- endif %}
    {{- "# Tools\n\n<tools>" }}
    {%- for tool in tools %}{{- "\n" }}{{- tool | tojson }}{%- endfor %}
    {{- "\n</tools><|im_end|>\n" }}
{%- else %}
    {%- if messages[0].role == 'system' %}
        {{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
    {%- endif %}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string and not(message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.content is string %}
        {%- set content = message.content %}
    {%- else %}
        {%- set content = '' %}
    {%- endif %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>' + '\n' }}
    {%- elif message.role == "assistant" %}
        {%- set reasoning_content = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning_content = message.reasoning_content %}
        {%- else %}
            {%- if '</think>' in content %}
                {%- set reasoning_content = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
                {%- set content = content.split('</think>')[-1].lstrip('\n') %}
            {%- endif %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index %}
            {%- if loop.last or (not loop.last and reasoning_content) %}
                {{- '<|im_start|>' + message.role + '\n<think>\n' + reasoning_content.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}
            {%- else %}
                {{- '<|im_start|>' + message.role + '\n' + content }}
            {%- endif %}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\n' + content }}
        {%- endif %}
        {%- if message.tool_calls %}
            {%- for tool_call in message.tool_calls %}
                {%- if (loop.first and content) or (not loop.first) %}{{- '\n' }}{%- endif %}
                {%- if tool_call.function %}{%- set tool_call = tool_call.function %}{%- endif %}
                {{- '<tool_call>\n{"name": "' }}{{- tool_call.name }}{{- '", "arguments": ' }}
                {%- if tool_call.arguments is string %}
                    {{- tool_call.arguments }}
                {%- else %}
                    {{- tool_call.arguments | tojson }}
                {%- endif %}
                {{- '}\n</tool_call>' }}
            {%- endfor %}
        {%- endif %}
        {{- '<|im_end|>\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.first or (messages[loop.index0 - 1].role != "tool") %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\n<tool_response>\n' }}{{- content }}{{- '\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}{{- '<|im_end|>\n' }}{%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}
{%- endif %}"""  # noqa: E501


def plain() -> PreTrainedTokenizerFast:
    """No template of its own."""
    tokenizer = scratch()
    tokenizer.chat_template = None
    return tokenizer


def scratch() -> PreTrainedTokenizerFast:
    """What `lit_align.models.scratch` makes."""
    return bpe_tokenizer([], BYTES)


def beginless() -> PreTrainedTokenizerFast:
    """Begins no text with BOS, as GPT-2's."""
    tokenizer = plain()
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel()
    return tokenizer


def _speaking(template: str, *special: str) -> PreTrainedTokenizerFast:
    tokenizer = scratch()
    tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    tokenizer.chat_template = template
    return tokenizer


def chatml() -> PreTrainedTokenizerFast:
    return _speaking(CHATML, "<|im_start|>", "<|im_end|>")


def llama3() -> PreTrainedTokenizerFast:
    return _speaking(LLAMA3, "<|start|>", "<|end|>", "<|eot|>")


def thinking() -> PreTrainedTokenizerFast:
    """Its <think> is an added token, as Qwen3's."""
    tokenizer = _speaking(THINKING, "<|im_start|>", "<|im_end|>")
    tokenizer.add_tokens(["<think>", "</think>"])
    return tokenizer


def qwen3() -> PreTrainedTokenizerFast:
    """Qwen3's template, and its stop token as the end of sequence."""
    tokenizer = _speaking(QWEN3, "<|im_start|>", "<|im_end|>")
    tokenizer.eos_token = "<|im_end|>"
    return tokenizer


def stopless() -> PreTrainedTokenizerFast:
    return _speaking(STOPLESS)


def strict() -> PreTrainedTokenizerFast:
    return _speaking(STRICT, "<|start|>", "<|end|>")


TOKENIZERS = {maker.__name__: maker for maker in (plain, scratch, chatml, llama3, thinking, stopless, strict)}


def decoded(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False)


def show(tokenizer: PreTrainedTokenizerFast, segment: Segment) -> str:
    """The text of a segment, with [[ ]] around each run of scored tokens."""
    text, inside = "", False
    run: list[int] = []
    for token, scored in [*zip(segment.tokens, segment.scored, strict=True), (None, False)]:
        if scored != inside or token is None:
            text += decoded(tokenizer, run) + ("]]" if inside else "[[" if scored else "")
            inside, run = scored, []
        run.append(token)
    return text


def show_tree(tokenizer: PreTrainedTokenizerFast, example: Example) -> list[str]:
    """Trunk and branches."""
    return [show(tokenizer, segment) for segment in (example.trunk, *example.branches)]
