import json

import pytest
import torch
from data.chats import TOKENIZERS, decoded
from data.golden import GOLDEN

from lit_align.data.chat import ChatEncoder
from lit_align.data.formats import FORMATS
from lit_align.data.instruction import InstructionDataModule
from lit_align.data.prompt import PromptDataModule
from lit_align.data.rows import BadField, Tally
from lit_align.data.source import Source


def module(name: str = "scratch", **options) -> PromptDataModule:
    made = PromptDataModule("unused", [], cache_dir="none", **options)
    made.encoder = ChatEncoder(TOKENIZERS[name]())
    return made


HI = [{"role": "user", "content": "Hi"}]
# The prompt, and the row that the reward sees.
SCRATCH = {
    "alpaca without input": ("<bos><user> Hi <assistant>", {"prompt": HI, "reference": "Yo"}),
    "instances": ("<bos><user> Hi <assistant>", {"prompt": HI, "reference": "Yo"}),
    "messages": ("<bos><user> Hi <assistant>", {"prompt": HI, "reference": "Yo"}),
    "prompt_completion": ("<bos>Hi", {"prompt": "Hi", "reference": " Yo"}),
    "pairs": ("<bos>Hi", {"prompt": "Hi"}),
    "rankings with all there is": ("<bos><user> Hi <assistant>", {"prompt": HI}),
    "pairs with a share and scores": ("<bos><user> Hi <assistant>", {"prompt": HI}),
    "answers": ("<bos><user> Hi <assistant>", {"prompt": HI}),
    "prompts": ("<bos>Hi", {"prompt": "Hi", "reference": "Yo", "level": 3, "tags": ["a"]}),
    "turns": (
        "<bos><user> Hi <assistant>",
        {"prompt": HI, "question_id": 81, "turns": ["Hi", "Again."], "category": "writing"},
    ),
    "questions": ("<bos><user> Hi <assistant>", {"prompt": HI, "label": "safe"}),
}


@pytest.mark.parametrize("kind", SCRATCH)
def test_golden_prompt_and_row(kind: str) -> None:
    format, raw, _ = GOLDEN[kind]
    data = module()
    (item,) = data.encode(FORMATS[format](raw)[0], Tally())
    assert decoded(data.tokenizer, item.example.trunk.tokens) == SCRATCH[kind][0]
    assert item.row == SCRATCH[kind][1]
    assert not any(item.example.trunk.scored)


def test_columns_of_a_bare_prompt_are_the_rewards() -> None:
    row = {"prompt": "Hi", "scores": [1, 2], "shares": "of a company"}
    (item,) = module().encode(FORMATS["prompts"](row)[0], Tally())
    assert item.row == row


@pytest.mark.parametrize("template", TOKENIZERS)
def test_a_prompt_ends_where_the_answer_begins(template: str) -> None:
    data = module(template)
    (item,) = data.encode({"prompt": HI}, Tally())
    assert item.example.trunk.tokens == data.encoder.prompt(HI)
    assert item.example.trunk.tokens.count(data.tokenizer.bos_token_id) <= 1


def test_a_conversation_must_end_with_an_answer() -> None:
    yo = {"role": "assistant", "content": "Yo"}
    for messages in ([*HI, yo, *HI], [yo]):
        with pytest.raises(BadField, match="'messages' must end with an assistant turn after a prompt"):
            module().encode({"messages": messages}, Tally())
    with pytest.raises(BadField, match="'text' has no prompt"):
        module().encode({"text": "x"}, Tally())


def test_long_prompts_keep_their_end() -> None:
    tally = Tally()
    data = module(max_length=4)
    (item,) = data.encode({"prompt": "abcdefg"}, tally)
    assert decoded(data.tokenizer, item.example.trunk.tokens) == "<bos>efg"
    assert tally == {"truncated": 1}
    with pytest.raises(BadField, match="'tokens' number 8, above max_length 4"):
        module(max_length=4, truncate="never").encode({"prompt": "abcdefg"}, tally)


def test_batch_holds_prompts_and_their_rows(write, tokenizer_folder: str) -> None:
    raw = [{"question": f"What is {i}?", "answer": str(i), "level": {"n": i}} for i in range(6)]
    columns = {"prompt": "question", "reference": "answer"}
    source = Source(write("x.jsonl", raw), format="questions", columns=columns)
    data = PromptDataModule(tokenizer_folder, [source], batch_size=4, val_fraction=0.0)
    data.prepare_data()
    data.setup("fit")
    batches = list(data.train_dataloader())
    assert [len(batch.prompts) for batch in batches] == [4, 4]
    for batch in batches:
        assert batch.ptx is None
        for prompt, row in zip(batch.prompts, batch.rows, strict=True):
            i = int(row["reference"])
            assert row == {
                "prompt": [{"role": "user", "content": f"What is {i}?"}],
                "reference": str(i),
                "level": {"n": i},
            }
            assert prompt.dtype == torch.int64
            assert decoded(data.tokenizer, prompt.tolist()) == f"<bos><user> What is {i}? <assistant>"


def test_text_of_ppo_ptx_follows_the_position_of_the_prompts(write, tokenizer_folder: str) -> None:
    prompts = Source(write("p.jsonl", [{"prompt": f"p{i}"} for i in range(8)]))
    texts = Source(write("t.jsonl", [{"text": f"t{i}"} for i in range(5)]))

    def made() -> PromptDataModule:
        ptx = InstructionDataModule(tokenizer_folder, [texts], batch_size=3, val_fraction=0.0)
        data = PromptDataModule(tokenizer_folder, [prompts], ptx=ptx, batch_size=2, val_fraction=0.0)
        data.prepare_data()
        data.setup("fit")
        return data

    def seen(batches) -> list[str]:
        return [
            json.dumps([[row["prompt"] for row in batch.rows], batch.ptx.target_S.tolist(), batch.ptx.num_examples])
            for batch in batches
        ]

    data = made()
    whole = seen(data.train_dataloader()) + seen(data.train_dataloader())
    assert len(whole) == 8
    assert all(line.endswith("3]") for line in whole)
    assert len({line.split("], [")[1] for line in whole}) > 4
    again = made()
    again.load_state_dict({"batches": 4})
    assert seen(again.train_dataloader()) == whole[4:]


def test_prompts_have_no_micro_batches(write, tokenizer_folder: str) -> None:
    source = Source(write("x.jsonl", [{"prompt": "a"}]))
    ptx = InstructionDataModule(tokenizer_folder, [source], micro_batch_tokens=9)
    for options in ({"micro_batch_tokens": 9}, {"ptx": ptx}):
        with pytest.raises(ValueError, match=r"micro_batch_tokens is not for prompts.*set model.micro_batch_size"):
            PromptDataModule(tokenizer_folder, [source], **options)


def test_ppo_ptx_without_text_is_an_error_at_once(write, tokenizer_folder: str) -> None:
    prompts = Source(write("p.jsonl", [{"prompt": "p"}]))
    bad = Source(write("t.jsonl", [{"text": ""}]))
    ptx = InstructionDataModule(tokenizer_folder, [bad], val_fraction=0.0, on_bad_row="skip")
    data = PromptDataModule(tokenizer_folder, [prompts], ptx=ptx, val_fraction=0.0)
    with pytest.raises(ValueError, match="there are no training examples"):
        data.setup("fit")
