"""Tool calls, tools, reasoning, parts and marks of turns: carried to the template, or refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import datasets
import pytest
from data.chats import chatml, qwen3, show_tree

from lit_align.data.instruction import InstructionDataModule
from lit_align.data.preference import PreferenceDataModule
from lit_align.data.prompt import PromptDataModule
from lit_align.data.rows import BadRow
from lit_align.data.source import Source

TOOL = {"type": "function", "function": {"name": "lookup", "description": "Look up.", "parameters": {"type": "object"}}}
USER = {"role": "user", "content": "How warm?"}
CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "lookup", "arguments": {"x": 1}}}]}
RESULT = {"role": "tool", "content": "42", "name": "lookup"}
ANSWER = {"role": "assistant", "content": "It is 42."}
CALLED = '<tool_call>\n{"name": "lookup", "arguments": {"x": 1}}\n</tool_call><|im_end|>'


@pytest.fixture
def shown(write: Callable[[str, Any], str], tmp_path: Any) -> Callable[..., list[str]]:
    """What a data module makes of rows; [[what is scored]]."""

    def made(rows: Sequence[dict] | str, tokenizer: Any = None, kind: Any = InstructionDataModule, **options: Any):
        tokenizer = tokenizer or qwen3()
        tokenizer.save_pretrained(tmp_path / "model")
        source = rows if isinstance(rows, str) else write("rows.jsonl", list(rows))
        options = {"val_fraction": 0.0, "cache_dir": "none", **options}
        data = kind(str(tmp_path / "model"), [Source(source)], **options)
        data.prepare_data()
        data.setup("fit")
        (store,) = data.stores("train")
        made.data, made.tally = data, store.tally
        trees = [show_tree(data.tokenizer, store[i].example) for i in range(len(store))]
        return [tree if len(tree) > 1 else tree[0] for tree in trees]

    return made


def test_a_turn_that_calls_a_tool_is_scored_and_the_result_is_context(shown) -> None:
    first, last = shown([{"messages": [USER, CALL, RESULT, ANSWER], "tools": [TOOL]}])
    before = f"<|im_start|>system\n# Tools\n\n<tools>\n{json.dumps(TOOL)}\n</tools><|im_end|>\n"
    before += "<|im_start|>user\nHow warm?<|im_end|>\n<|im_start|>assistant\n"
    # Qwen3's template drops the empty thoughts once another turn follows: each turn is an example of its own.
    assert first == f"{before}[[<think>\n\n</think>\n\n{CALLED}]]"
    result = "<|im_start|>user\n<tool_response>\n42\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    assert last == f"{before}{CALLED}\n{result}[[<think>\n\n</think>\n\nIt is 42.<|im_end|>]]"


@pytest.mark.parametrize(
    "call",
    [
        {"function": {"name": "lookup", "arguments": '{"x": 1}'}},
        {"name": "lookup", "arguments": {"x": 1}},
        {"type": "function", "id": "a", "function": {"name": "lookup", "arguments": {"x": 1, "y": None}}},
    ],
)
def test_arguments_are_json_text_or_a_dictionary(shown, call: dict) -> None:
    for calls in ([call], json.dumps([call])):
        turn = {"role": "assistant", "content": None, "tool_calls": calls}
        (text,) = shown([{"messages": [USER, turn], "tools": json.dumps([TOOL["function"]])}])
        assert text.endswith(f"[[<think>\n\n</think>\n\n{CALLED}]]")
        assert "Look up." in text
    (text,) = shown(
        [{"messages": [USER, {"role": "assistant", "content": None, "function_call": call.get("function", call)}]}]
    )
    assert CALLED in text


def test_nulls_that_datasets_fills_in_are_absent_keys(shown, tmp_path) -> None:
    plain = {"messages": [USER, ANSWER], "tools": None}
    called = {"messages": [USER, CALL, RESULT, ANSWER], "tools": [TOOL]}
    datasets.Dataset.from_list([plain, called]).to_parquet(tmp_path / "rows.parquet")
    assert shown(str(tmp_path / "rows.parquet")) == shown([plain, called])


def test_reasoning_is_scored_under_each_of_its_names(shown) -> None:
    for name in ("reasoning_content", "reasoning", "thinking"):
        (text,) = shown([{"messages": [USER, {**ANSWER, name: "Let me think."}]}])
        assert text.endswith("assistant\n[[<think>\nLet me think.\n</think>\n\nIt is 42.<|im_end|>]]")
    parts = [{"type": "thinking", "thinking": "Let me think."}, {"type": "text", "text": "It is 42."}]
    assert shown([{"messages": [USER, {"role": "assistant", "content": parts}]}]) == [text]


def test_reasoning_reaches_a_template_under_the_name_that_it_reads(shown) -> None:
    template = chatml().chat_template.replace("message['content']", "(message.thinking or '') + message['content']")
    (text,) = shown([{"messages": [USER, {**ANSWER, "reasoning": "Hm. "}]}], chatml(), chat_template=template)
    assert text.endswith("[[Hm. It is 42.<|im_end|>]]")


def test_what_the_template_ignores_is_an_error_or_a_counted_skip(shown) -> None:
    thinking, result = {**ANSWER, "reasoning": "Hm."}, {"role": "tool", "content": "42"}
    silent = chatml().chat_template.replace("message in messages", "message in messages if message.role != 'tool'")
    for row, template, what in [
        ({"messages": [USER, CALL, ANSWER]}, None, r"messages\[1\]' has tool_calls, which the chat template ignores"),
        (
            {"messages": [USER, thinking]},
            None,
            r"messages\[1\]' has reasoning_content, which the chat template ignores",
        ),
        ({"messages": [USER, ANSWER], "tools": [TOOL]}, None, "'tools' is ignored by the chat template"),
        ({"messages": [USER, result, ANSWER]}, silent, r"messages\[1\]' has content of the role tool"),
    ]:
        with pytest.raises(BadRow, match=f"row 1: .*{what}.*set data.chat_template"):
            shown([row], chatml(), chat_template=template)
        good = {"messages": [USER, ANSWER]}
        assert len(shown([row, good], chatml(), chat_template=template, on_bad_row="skip")) == 1
        assert (shown.tally["skipped"], shown.tally["examples"]) == (1, 1)


def test_prompts_and_pairs_carry_tools_and_calls(shown) -> None:
    (text,) = shown([{"prompt": "How warm?", "tools": [TOOL]}], kind=PromptDataModule)
    assert "Look up." in text
    assert text.endswith("<|im_start|>user\nHow warm?<|im_end|>\n<|im_start|>assistant\n")
    row = {"chosen": [USER, CALL], "rejected": [USER, ANSWER], "tools": [TOOL]}
    ((trunk, chosen, rejected),) = shown([row], kind=PreferenceDataModule)
    assert "Look up." in trunk
    assert chosen == f"[[<think>\n\n</think>\n\n{CALLED}]]"
    assert rejected == "[[<think>\n\n</think>\n\nIt is 42.<|im_end|>]]"
    with pytest.raises(BadRow, match=r"has tool_calls, which the chat template ignores"):
        shown([{"chosen": [USER, CALL], "rejected": [USER, ANSWER]}], chatml(), kind=PreferenceDataModule)


def test_a_completion_of_several_turns(shown) -> None:
    earlier = {"role": "assistant", "content": "Hi."}
    row = {"prompt": [USER, earlier, USER], "completion": [CALL, RESULT, ANSWER], "tools": [TOOL]}
    call, answer = shown([row])
    question = "<|im_start|>user\nHow warm?<|im_end|>\n<|im_start|>assistant\n"
    assert call.endswith(f"Hi.<|im_end|>\n{question}[[<think>\n\n</think>\n\n{CALLED}]]")
    assert answer.count("[[") == 1


def test_parts_of_text_are_joined_and_others_refused(shown) -> None:
    def row(*parts: Any) -> dict:
        return {"messages": [{"role": "user", "content": list(parts)}, ANSWER]}

    text = {"type": "text", "text": "How warm?", "image": None}
    assert shown([row(text)], chatml()) == shown([{"messages": [USER, ANSWER]}], chatml())
    assert shown([row({"type": "input_text", "text": "How "}, "warm?")], chatml()) == shown([row(text)], chatml())
    for kind in ("image", "image_url", "audio"):
        with pytest.raises(BadRow, match=rf"messages\[0\].content\[1\]' is of type '{kind}': only parts of text"):
            shown([row(text, {"type": kind, "url": "x"})], chatml())


def test_a_turn_marked_as_context_is_not_scored(shown) -> None:
    for mark in ({"weight": 0}, {"train": False}, {"training": False}, {"loss": False}):
        (text,) = shown([{"messages": [USER, {**ANSWER, **mark}, USER, {**ANSWER, "weight": 1}]}], chatml())
        assert text.count("[[") == 1
        assert text.endswith("[[It is 42.<|im_end|>]]")
    turns = [
        {"from": "human", "value": "Hi"},
        {"from": "gpt", "value": "Yo", "weight": 0},
        {"from": "gpt", "value": "No"},
    ]
    (text,) = shown([{"conversations": turns}], chatml())
    assert text.endswith("Yo<|im_end|>\n<|im_start|>assistant\n[[No<|im_end|>]]")
    with pytest.raises(BadRow, match=r"messages\[1\].weight' is 0.5: a turn is trained on .true or 1. or is context"):
        shown([{"messages": [USER, {**ANSWER, "weight": 0.5}]}], chatml())
    rows = [{"messages": [USER, {**ANSWER, "train": False}]}, {"messages": [USER, ANSWER]}]
    assert len(shown(rows, chatml())) == 1
    assert shown.tally["rows_with_nothing_to_train_on"] == 1


def test_a_developer_is_the_system_of_a_template_that_has_none(shown) -> None:
    developer, system = ({"role": role, "content": "Be brief."} for role in ("developer", "system"))
    assert shown([{"messages": [developer, USER, ANSWER]}]) == shown([{"messages": [system, USER, ANSWER]}])
    (text,) = shown([{"messages": [developer, USER, ANSWER]}], chatml())
    assert text.startswith("<|im_start|>developer\nBe brief.<|im_end|>")


def test_llama_factory_columns(shown) -> None:
    turns = [
        {"from": "human", "value": "How warm?"},
        {"from": "function_call", "value": json.dumps({"name": "lookup", "arguments": {"x": 1}})},
        {"from": "observation", "value": "42"},
        {"from": "gpt", "value": "It is 42."},
    ]
    row = {"conversations": turns, "tools": json.dumps([TOOL["function"]]), "system": "Be brief."}
    system = {"role": "system", "content": "Be brief."}
    same = {"messages": [system, USER, CALL, {"role": "tool", "content": "42"}, ANSWER], "tools": [TOOL]}
    assert shown([row]) == shown([same])


SYSTEM = "<|im_start|>system\nBe brief.<|im_end|>\n"


@pytest.mark.parametrize(
    ("kind", "row"),
    [
        (InstructionDataModule, {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}]}),
        (InstructionDataModule, {"messages": [USER, ANSWER]}),
        (InstructionDataModule, {"instruction": "Hi", "input": "", "output": "Yo"}),
        (InstructionDataModule, {"prompt": [USER], "completion": "Yo"}),
        (InstructionDataModule, {"prompt": "Hi", "completion": "Yo"}),
        (PreferenceDataModule, {"prompt": "Hi", "chosen": "Yo", "rejected": "No"}),
        (PreferenceDataModule, {"instruction": "Hi", "chosen": "Yo", "rejected": "No"}),
        (PreferenceDataModule, {"chosen": [USER, ANSWER], "rejected": [USER, {**ANSWER, "content": "No"}]}),
        (PromptDataModule, {"prompt": "Hi"}),
        (PromptDataModule, {"turns": ["Hi"]}),
    ],
)
def test_a_system_column_comes_first(shown, kind: Any, row: dict) -> None:
    for column in ("system", "system_prompt"):
        (text,) = shown([{**row, column: "Be brief."}], chatml(), kind=kind)
        assert (text if isinstance(text, str) else text[0]).startswith(SYSTEM)
    (text,) = shown([{**row, "system": ""}], chatml(), kind=kind)
    assert "system" not in text


def test_a_system_column_that_contradicts_the_conversation(shown) -> None:
    system = {"role": "system", "content": "Be brief."}
    (text,) = shown([{"messages": [system, USER, ANSWER], "system": "Be brief."}], chatml())
    assert text.count("Be brief.") == 1
    with pytest.raises(BadRow, match="'system' differs from the system message that the conversation begins with"):
        shown([{"messages": [system, USER, ANSWER], "system": "Be long."}], chatml())


def test_history_is_context(shown) -> None:
    row = {"instruction": "Well?", "output": "No", "history": [["Hi", "Yo"]]}
    (text,) = shown([row], chatml())
    assert text == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYo<|im_end|>\n<|im_start|>user\nWell?<|im_end|>\n"
        "<|im_start|>assistant\n[[No<|im_end|>]]"
    )
    with pytest.raises(BadRow, match=r"history\[0\]' is 'Hi', expected \[question, answer\]"):
        shown([{**row, "history": ["Hi"]}], chatml())


def test_qwen3s_own_template_takes_several_turns(shown) -> None:
    thought = {**ANSWER, "reasoning_content": "Hm."}
    first, second = shown([{"messages": [USER, thought, USER, thought]}])
    before = "<|im_start|>user\nHow warm?<|im_end|>\n<|im_start|>assistant\n"
    turn = "[[<think>\nHm.\n</think>\n\nIt is 42.<|im_end|>]]"
    # Each turn has before it what the model sees when it says it: earlier turns without their thoughts.
    assert (first, second) == (before + turn, f"{before}It is 42.<|im_end|>\n{before}{turn}")
    assert shown.tally["turns_as_examples_of_their_own"] == 2
    item = shown.data.stores("train")[0]
    assert item[0].group == item[1].group
