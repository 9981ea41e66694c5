"""Prompts of plain text: a user's turn for a chat model, text for a base model; and chat templates by name."""

from __future__ import annotations

import logging
import shutil
from typing import Any

import pytest
from data.chats import TOKENIZERS, plain, qwen3, show_tree
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lit_align.data.chat import ChatEncoder
from lit_align.data.chat_templates import NAMES, read_template
from lit_align.data.instruction import InstructionDataModule
from lit_align.data.preference import PreferenceDataModule
from lit_align.data.prompt import PromptDataModule
from lit_align.data.rows import BadField, BadRow
from lit_align.data.source import Source
from lit_align.models.scratch import bpe_tokenizer


@pytest.fixture
def made(write, tmp_path):
    """A data module of rows, set up."""

    def build(tokenizer: PreTrainedTokenizerBase, rows: list[dict], kind: Any = InstructionDataModule, **options: Any):
        shutil.rmtree(tmp_path / "model", ignore_errors=True)
        tokenizer.save_pretrained(tmp_path / "model")
        options = {"val_fraction": 0.0, "cache_dir": "none", **options}
        data = kind(str(tmp_path / "model"), [Source(write("rows.jsonl", rows))], **options)
        data.prepare_data()
        data.setup("fit")
        return data

    return build


def trees(data: Any) -> list[list[str]]:
    (store,) = data.stores("train")
    return [show_tree(data.tokenizer, store[i].example) for i in range(len(store))]


ASKED = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
KINDS = [
    (InstructionDataModule, {"prompt": "Hi", "completion": "Yo"}, [f"{ASKED}[[Yo<|im_end|>]]"]),
    (
        PreferenceDataModule,
        {"prompt": "Hi", "chosen": "Yo", "rejected": "No"},
        [ASKED, "[[Yo<|im_end|>]]", "[[No<|im_end|>]]"],
    ),
    (
        PreferenceDataModule,
        {"prompt": "Hi", "completions": ["Yo", "No"], "ranks": [0, 1]},
        [ASKED, "[[Yo<|im_end|>]]", "[[No<|im_end|>]]"],
    ),
    (PromptDataModule, {"prompt": "Hi"}, [ASKED]),
]


@pytest.mark.parametrize(("kind", "row", "expected"), KINDS)
def test_a_text_is_a_users_turn_of_a_chat_model(made, kind: Any, row: dict, expected: list[str]) -> None:
    data = made(TOKENIZERS["chatml"](), [row], kind)
    assert trees(data) == [expected]
    assert data.stores("train")[0].tally.languages == {"template": 1}


@pytest.mark.parametrize(("kind", "row", "expected"), KINDS)
def test_template_none_leaves_it_as_text(made, kind: Any, row: dict, expected: list[str]) -> None:
    data = made(TOKENIZERS["chatml"](), [row], kind, template="none")
    assert trees(data)[0][0].startswith("<bos>Hi")
    # A base model's tokenizer has no template, and its prompts are text without a word.
    base = made(plain(), [row], kind)
    assert trees(base) == trees(data)
    assert base.stores("train")[0].tally.languages == {"text": 1}


@pytest.mark.parametrize("column", ["prompt", "instruction"])
def test_a_prompt_in_the_template_already_is_used_as_it_is(made, column: str) -> None:
    answer = "completion" if column == "prompt" else "output"
    rows = [{column: ASKED, answer: "Yo"}, {column: ASKED, answer: "Yo<|im_end|>"}, {column: "Hi", answer: "Yo"}]
    data = made(TOKENIZERS["chatml"](), rows)
    assert [tree[0].removeprefix("<bos>") for tree in trees(data)] == [f"{ASKED}[[Yo<|im_end|>]]"] * 3
    tally = data.stores("train")[0].tally
    assert tally["prompts_in_the_chat_template_already"] == 2
    assert "2 prompts in the chat template already" in str(tally)


def test_a_template_without_special_tokens_is_recognised_by_both_ends(made) -> None:
    data = made(
        TOKENIZERS["stopless"](), [{"prompt": "U: Hi\nA:", "completion": " Yo"}, {"prompt": "U: a", "completion": "b"}]
    )
    assert trees(data) == [["<bos>U: Hi\nA:[[ Yo<eos>]]"], ["U: U: a\nA:[[ b<eos>]]"]]


def test_tools_beside_a_prompt_in_the_template_already(made) -> None:
    row = {"prompt": ASKED, "completion": "Yo", "tools": [{"name": "lookup"}]}
    with pytest.raises(BadRow, match="'tools' stand beside a prompt that is already written in the chat template"):
        made(qwen3(), [row])


def test_what_was_tokenised_as_a_turn_is_not_taken_for_text(made, tmp_path) -> None:
    row = {"prompt": "Hi", "completion": "Yo"}
    cache = {"cache_dir": str(tmp_path / "cache")}
    first = trees(made(TOKENIZERS["chatml"](), [row], **cache))
    assert trees(made(TOKENIZERS["chatml"](), [row], template="none", **cache)) != first
    again = made(TOKENIZERS["chatml"](), [row], **cache)
    assert (trees(again), again.stores("train")[0].tally.languages) == (first, {"template": 1})


def test_a_base_model_gets_the_plain_template_only_if_rows_were_written_by_it(made) -> None:
    text = made(plain(), [{"prompt": "Hi", "completion": "Yo"}, {"prompt": "a", "completion": "b"}])
    assert text.exported_tokenizer.chat_template is None
    chat = made(plain(), [{"instruction": "Hi", "output": "Yo"}])
    assert chat.exported_tokenizer.chat_template == chat.tokenizer.chat_template
    own = made(TOKENIZERS["chatml"](), [{"prompt": "Hi", "completion": "Yo"}], template="none")
    assert own.exported_tokenizer.chat_template is not None


# Templates by name.

USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}],
}
RESULT = {"role": "tool", "content": "42"}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
MARKS = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|end|>"]
MARKS += ["<start_of_turn>", "<end_of_turn>"]


def marked() -> PreTrainedTokenizerBase:
    """A tokenizer that has the tokens of all templates, and no template."""
    tokenizer = bpe_tokenizer([], 256 + 7)
    tokenizer.add_special_tokens({"additional_special_tokens": MARKS})
    tokenizer.chat_template = None
    return tokenizer


@pytest.mark.parametrize("name", NAMES)
def test_templates_by_name_append_only(name: str) -> None:
    encoder = ChatEncoder(marked(), read_template(name))
    takes_tools = name in ("chatml", "llama3", "mistral", "qwen3")
    messages = [USER, ANSWER, USER, {**ANSWER, "content": "Well, no."}]
    if name != "gemma":
        messages = [{"role": "system", "content": "Be brief."}, *messages]
    if takes_tools:
        messages = [*messages, USER, CALL, RESULT, ANSWER]
    tools = TOOLS if takes_tools else None
    whole = encoder.conversation(messages, tools)  # refuses what is rendered differently later, or ignored
    starts = [i for i in range(1, len(whole.scored)) if whole.scored[i] and not whole.scored[i - 1]]
    assert len(starts) == len(encoder.scored_turns(messages)) == (4 if takes_tools else 2)
    for start, place in zip(starts, encoder.scored_turns(messages), strict=True):
        # Training sees at each turn what the model is given when it is asked.
        before, said = messages[:place], encoder.answer(messages[:place], messages[place], tools=tools).tokens
        assert encoder.tokenizer.decode(whole.tokens[:start]) == encoder.tokenizer.decode(encoder.prompt(before, tools))
        assert whole.tokens[start : start + len(said)] == said
        assert said[-1] in encoder.stop_ids
    if not takes_tools:
        with pytest.raises(BadField, match=r"ignored by the chat template|Gemma has no turn|has no results of tools"):
            encoder.conversation([USER, CALL, RESULT, ANSWER], TOOLS)


def test_thoughts_stay_in_the_templates_that_have_them() -> None:
    thought = {**ANSWER, "reasoning_content": "Hm."}
    for name in ("qwen3", "chatml"):
        encoder = ChatEncoder(marked(), read_template(name))
        text = encoder.tokenizer.decode(encoder.conversation([USER, thought, USER, ANSWER]).tokens)
        assert "<|im_start|>assistant\n<think>\nHm.\n</think>\n\nYo<|im_end|>" in text
    with pytest.raises(BadField, match="reasoning_content, which the chat template ignores"):
        ChatEncoder(marked(), read_template("llama3")).conversation([USER, thought])


def test_gemma_says_what_to_do_with_a_system_turn() -> None:
    encoder = ChatEncoder(marked(), read_template("gemma"))
    with pytest.raises(BadField, match="Gemma has no turn of the system: put its text into the first turn of the user"):
        encoder.conversation([{"role": "system", "content": "Be brief."}, USER, ANSWER])


def test_a_template_by_name_or_file_or_as_jinja(made, tmp_path, caplog) -> None:
    rows = [{"messages": [USER, ANSWER]}]
    named = made(TOKENIZERS["chatml"](), rows, chat_template="qwen3")
    assert trees(named) == [
        ["<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n[[<think>\n\n</think>\n\nYo<|im_end|>]]"]
    ]
    file = tmp_path / "mine.jinja"
    file.write_text(read_template("qwen3"))
    assert trees(made(TOKENIZERS["chatml"](), rows, chat_template=str(file))) == trees(named)
    assert trees(made(TOKENIZERS["chatml"](), rows, chat_template=file.read_text())) == trees(named)
    # What the run leaves is the template that it trained with.
    named.exported_tokenizer.save_pretrained(tmp_path / "left")
    assert AutoTokenizer.from_pretrained(tmp_path / "left").chat_template == read_template("qwen3")
    with pytest.raises(
        ValueError, match=r"chat_template: 'mine' is neither a template by name \(chatml, gemma, .*nor a file"
    ):
        made(TOKENIZERS["chatml"](), rows, chat_template="mine")
    with caplog.at_level(logging.INFO):
        data = made(plain(), rows, chat_template="llama3")
    assert "the tokenizer has no tokens <|start_header_id|>, <|end_header_id|>, <|eot_id|>" in caplog.text
    assert trees(data)[0][0].endswith("Yo<|eot_id|><eos>]]")
