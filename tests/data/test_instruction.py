import json

import pytest
import torch
from data.chats import TOKENIZERS, beginless, decoded, scratch, show
from data.golden import GOLDEN

from lit_align.data.chat import ChatEncoder
from lit_align.data.formats import FORMATS
from lit_align.data.instruction import InstructionDataModule, group_of
from lit_align.data.rows import BadField, Tally
from lit_align.data.source import Source


def module(name: str = "scratch", **options) -> InstructionDataModule:
    """A data module whose tokenizer speaks a template."""
    made = InstructionDataModule("unused", [], cache_dir="none", **options)
    made.encoder = ChatEncoder(TOKENIZERS[name](), turns=made.turns)
    return made


def shown(data: InstructionDataModule, row: dict, tally: Tally | None = None) -> list[str]:
    return [
        show(data.tokenizer, item.example.trunk) for item in data.encode(row, tally if tally is not None else Tally())
    ]


# What training sees of each format's golden row; [[what is scored]].
SCRATCH = {
    "alpaca": ["<bos><user> Add.\n\n1 2 <assistant>[[ 3 <eos>]]"],
    "alpaca without input": ["<bos><user> Hi <assistant>[[ Yo <eos>]]"],
    "instances": ["<bos><user> Hi <assistant>[[ Yo <eos>]]", "<bos><user> Hi\n\nx <assistant>[[ No <eos>]]"],
    "sharegpt": [
        "<bos><system> Be brief. <user> Hi <assistant>[[ Yo <eos>]]<tool> {} <user> Well? <assistant>[[ No <eos>]]"
    ],
    "messages": ["<bos><user> Hi <assistant>[[ Yo <eos>]]"],
    "prompt_completion": ["<bos>Hi[[ Yo<eos>]]"],  # no template where none is asked for
    "prompt_completion, conversational": ["<bos><user> Hi <assistant>[[ Yo <eos>]]"],
    "prompt_completion, the answer a turn": ["<bos><user> Hi <assistant>[[ Yo <eos>]]"],
    "preferred": ["<bos><user> Hi <assistant> Yo <eos><user> Well? <assistant>[[ Yo <eos>]]"],
    "text": ["<bos>[[ Once.\n<eos>]]"],
}
CHATML = {
    "alpaca": ["<|im_start|>user\nAdd.\n\n1 2<|im_end|>\n<|im_start|>assistant\n[[3<|im_end|>]]"],
    "sharegpt": [
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n[[Yo<|im_end|>]]\n<|im_start|>tool\n{}<|im_end|>\n"
        "<|im_start|>user\nWell?<|im_end|>\n<|im_start|>assistant\n[[No<|im_end|>]]"
    ],
    "prompt_completion": ["<bos>Hi[[ Yo<eos>]]"],
    "text": ["<bos>[[ Once.\n<eos>]]"],
}


@pytest.mark.parametrize(
    ("template", "kind", "expected"),
    [("scratch", *case) for case in SCRATCH.items()] + [("chatml", *case) for case in CHATML.items()],
)
def test_golden_tokens(template: str, kind: str, expected: list[str]) -> None:
    format, raw, _ = GOLDEN[kind]
    data = module(template)
    assert [text for row in FORMATS[format](raw) for text in shown(data, row)] == expected


def test_golden_ids() -> None:
    (item,) = module().encode({"prompt": "a", "completion": "b"}, Tally())
    a, b = scratch().convert_tokens_to_ids(["a", "b"])
    assert item.example.trunk == ([1, a, b, 2], [False, False, True, True])


DEMONSTRATIONS = [name for name, (format, _, rows) in GOLDEN.items() if {"messages", "completion"} & set(rows[0])]


@pytest.mark.parametrize("template", TOKENIZERS)
@pytest.mark.parametrize("kind", [name for name in DEMONSTRATIONS if "begins" not in name])
def test_stop_token_is_learnt_in_every_format_and_template(template: str, kind: str) -> None:
    data = module(template, turns="last")
    format, raw, _ = GOLDEN[kind]
    for row in FORMATS[format](raw):
        if template == "strict" and kind == "sharegpt":
            with pytest.raises(BadField, match="System role not supported"):
                data.encode(row, Tally())
            continue
        for tokens, scored in (item.example.trunk for item in data.encode(row, Tally())):
            assert tokens[-1] in data.stop_ids
            assert scored[-1]
            assert not scored[0]


def test_all_turns_or_the_last() -> None:
    row = FORMATS["sharegpt"](GOLDEN["sharegpt"][1])[0]
    assert shown(module(turns="last"), row) == [
        "<bos><system> Be brief. <user> Hi <assistant> Yo <eos><tool> {} <user> Well? <assistant>[[ No <eos>]]"
    ]


def test_loss_on_all_scores_the_prompt_too(write, tokenizer_folder: str) -> None:
    everything = "<bos>[[<system> Be brief. <user> Hi <assistant> Yo <eos><tool> {} <user> Well? <assistant> No <eos>]]"
    row = FORMATS["sharegpt"](GOLDEN["sharegpt"][1])[0]
    assert shown(module(loss_on="all"), row) == [everything]
    # What is cut stays what it is: the beginning of the prompt.
    short = {"prompt": "abcdef", "completion": "uvw"}
    assert shown(module(loss_on="all", max_length=7), short) == ["<bos>[[efuvw<eos>]]"]
    with pytest.raises(ValueError, match="loss_on: all scores every token of a conversation"):
        module(loss_on="all", turns="last")
    # And what was tokenised for the one is not taken for the other.
    source = Source(write("x.jsonl", [short]))
    for loss_on, scored in (("response", 4), ("all", 10), ("response", 4)):
        options = {"template": "none", "val_fraction": 0.0, "batch_size": 1}
        data = InstructionDataModule(tokenizer_folder, [source], loss_on=loss_on, **options)
        data.setup("fit")
        (batch,) = data.train_dataloader()
        assert batch.num_scored == scored


def test_text_is_cut_into_pieces_and_none_of_it_dropped() -> None:
    data = module(max_length=4)
    tally = Tally()
    # Each piece begins with the last token of the one before, unscored.
    assert shown(data, {"text": "abcdefg"}, tally) == ["<bos>[[abc]]", "c[[def]]", "f[[g<eos>]]"]
    assert shown(data, {"text": "ab"}, tally) == ["<bos>[[ab<eos>]]"]
    assert not tally


def test_too_long_is_cut_and_counted() -> None:
    row, tally = {"prompt": "abcdef", "completion": "uvw"}, Tally()
    assert shown(module(max_length=7), row, tally) == ["<bos>ef[[uvw<eos>]]"]
    assert shown(module(max_length=9, truncate="answer"), row, tally) == ["<bos>abcdef[[uv]]"]
    assert shown(module(max_length=11), row, tally) == ["<bos>abcdef[[uvw<eos>]]"]
    assert tally == {"truncated": 2}
    with pytest.raises(BadField, match="'tokens' number 11, above max_length 10"):
        module(max_length=10, truncate="never").encode(row, tally)
    with pytest.raises(BadField, match="'tokens' of the prompt number 7 or more"):
        module(max_length=7, truncate="answer").encode(row, tally)


@pytest.mark.parametrize("kind", ["pairs", "rankings", "prompts", "choices"])
def test_rows_that_demonstrate_nothing(kind: str) -> None:
    format, raw, _ = GOLDEN[kind]
    with pytest.raises(BadField, match="'prompt' belongs to rankings or bare prompts, which hold no demonstration"):
        module().encode(FORMATS[format](raw)[0], Tally())


def test_a_single_token_leaves_nothing_to_learn() -> None:
    data = module()
    data.encoder = ChatEncoder(beginless())
    with pytest.raises(BadField, match="'text' comes out as a single token"):
        data.encode({"text": ""}, Tally())


def test_groups_are_prompts() -> None:
    def group(kind: str, n: int = 0) -> str:
        return module().encode(FORMATS[GOLDEN[kind][0]](GOLDEN[kind][1])[n], Tally())[0].group

    hi = [{"role": "user", "content": "Hi"}]
    # The same prompt is the same group, whatever the format and the answer.
    assert group("alpaca without input") == group("messages") == group("instances") == group_of(hi)
    assert group_of("Hi") == group_of(hi)
    assert group("instances", 1) != group("instances", 0)
    trailing = {"messages": [*hi, {"role": "assistant", "content": "x"}, {"role": "user", "content": "Bye"}]}
    assert module().encode(trailing, Tally())[0].group == group_of(hi)
    assert len({group_of("a"), group_of("b"), group_of([]), group_of(hi)}) == 4
    texts = module(max_length=3).encode({"text": "abcdefgh"}, Tally())
    assert {item.group for item in texts} == {group_of("abcdefgh")}


def test_batch_is_packed_and_scored_on_the_answers(write, tokenizer_folder: str) -> None:
    raw = [{"instruction": "x" * n, "output": "y" * (1 + n % 3)} for n in range(1, 7)]
    sources = [Source(write("x.json", raw))]
    data = InstructionDataModule(tokenizer_folder, sources, batch_size=6, val_fraction=0.0, row_tokens=40)
    data.setup("fit")
    (batch,) = data.train_dataloader()
    assert batch.num_examples == batch.num_sequences == 6
    assert len(batch.tokens_RN) == 3  # two of 11 .. 16 tokens in a row of 40
    tokenizer = data.tokenizer
    scored = [decoded(tokenizer, batch.target_S[batch.sequence_S == q].tolist()) for q in range(6)]
    assert sorted(scored) == sorted(f" {row['output']} <eos>" for row in raw)
    # What predicts an answer's first token is the last of its own prompt.
    before = batch.tokens_RN.flatten()[batch.source_S]
    for q in range(6):
        assert decoded(tokenizer, before[batch.sequence_S == q].tolist()) == "<assistant>" + scored[q].removesuffix(
            "<eos>"
        )
    assert torch.equal(batch.tokens_RN.flatten()[batch.last_Q], torch.full((6,), tokenizer.eos_token_id))


def test_a_row_to_batch_in_json_lines(write, tokenizer_folder: str) -> None:
    """Messages, prompts with answers and text in one file, each told by its own columns, is not one format."""
    path = write("x.jsonl", json.dumps({"text": "a"}) + "\n" + json.dumps({"messages": []}))
    with pytest.raises(ValueError, match=r"x\.jsonl, row 2: field 'text' is missing; the row has 'messages'"):
        InstructionDataModule(tokenizer_folder, [Source(path)]).setup("fit")
