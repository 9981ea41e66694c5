from pathlib import Path

import pytest
from data.chats import CHATML, TOKENIZERS, beginless, chatml, decoded, plain, scratch, show, stopless, strict, thinking
from data.fuzz import fuzz
from hypothesis import given
from hypothesis import strategies as st
from support.tiny import tiny_folder
from transformers import AddedToken, AutoTokenizer

from lit_align.data.chat import ChatEncoder, load_encoder
from lit_align.data.rows import BadField
from lit_align.models.scratch import bpe_tokenizer, word_tokenizer


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


SYSTEM, HI, YO = turn("system", "Be brief."), turn("user", "Hi"), turn("assistant", "Yo")
WELL, NO, BYE = turn("user", "Well?"), turn("assistant", "No."), turn("user", "Bye")

# What training sees of [user Hi, assistant Yo, user Well?, assistant No.]; [[what is scored]].
GOLDEN = {
    "plain": "<bos>User: Hi\n\nAssistant:[[ Yo<eos>]]\n\nUser: Well?\n\nAssistant:[[ No.<eos>]]",
    "scratch": "<bos><user> Hi <assistant>[[ Yo <eos>]]<user> Well? <assistant>[[ No. <eos>]]",
    "chatml": (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n[[Yo<|im_end|>]]\n"
        "<|im_start|>user\nWell?<|im_end|>\n<|im_start|>assistant\n[[No.<|im_end|>]]"
    ),
    "llama3": (
        "<bos><|start|>user<|end|>\n\nHi<|eot|><|start|>assistant<|end|>\n\n[[Yo<|eot|>]]"
        "<|start|>user<|end|>\n\nWell?<|eot|><|start|>assistant<|end|>\n\n[[No.<|eot|>]]"
    ),
    "stopless": "U: Hi\nA:[[ Yo<eos>]]\nU: Well?\nA:[[ No.<eos>]]",
    "strict": (
        "<|start|>user\nHi<|end|>\n<|start|>assistant\n[[Yo<|end|>]]\n"
        "<|start|>user\nWell?<|end|>\n<|start|>assistant\n[[No.<|end|>]]"
    ),
}
STOPS = {
    "plain": ["<eos>"],
    "scratch": ["<eos>"],
    "chatml": ["<|im_end|>", "<eos>"],
    "llama3": ["<|eot|>", "<eos>"],
    "thinking": ["<|im_end|>", "<eos>"],
    "stopless": ["<eos>"],
    "strict": ["<|end|>", "<eos>"],
}


@pytest.mark.parametrize("name", GOLDEN)
def test_every_assistant_turn_is_scored_up_to_its_stop_token(name: str) -> None:
    tokenizer = TOKENIZERS[name]()
    segment = ChatEncoder(tokenizer).conversation([HI, YO, WELL, NO])
    assert show(tokenizer, segment) == GOLDEN[name]


@pytest.mark.parametrize("name", GOLDEN)
def test_or_the_last_turn_alone(name: str) -> None:
    tokenizer = TOKENIZERS[name]()
    segment = ChatEncoder(tokenizer, turns="last").conversation([HI, YO, WELL, NO])
    first, scored = GOLDEN[name].split("[["), show(tokenizer, segment)
    before = (first[0] + first[1]).replace("]]", "")
    # Without a stop token of its own, a template writes none between earlier turns.
    assert scored == (before.replace("<eos>", "") if name == "stopless" else before) + "[[" + first[2]


def test_ids_of_a_conversation() -> None:
    segment = ChatEncoder(scratch()).conversation([turn("user", "a"), turn("assistant", "b")])
    # <bos> <user> ␣ a ␣ <assistant> | ␣ b ␣ <eos>; bytes follow the 7 special tokens in the order of GPT-2's alphabet.
    space, a, b = (scratch().convert_tokens_to_ids(token) for token in ("Ġ", "a", "b"))
    assert segment.tokens == [1, 4, space, a, space, 5, space, b, space, 2]
    assert segment.scored == [False] * 6 + [True] * 4
    assert len({space, a, b}) == 3
    assert min(space, a, b) > 6


@pytest.mark.parametrize("name", TOKENIZERS)
def test_stop_tokens(name: str) -> None:
    tokenizer = TOKENIZERS[name]()
    encoder = ChatEncoder(tokenizer)
    assert tokenizer.convert_ids_to_tokens(encoder.stop_ids) == STOPS[name]
    # The first is what ends an answer to a conversation, the last what ends plain text.
    assert encoder.answer([HI], "Yo").tokens[-1] == encoder.stop_ids[0]
    assert encoder.answer("Hi", "Yo").tokens[-1] == encoder.text("Yo").tokens[-1] == encoder.stop_ids[-1]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_prompt_and_answer_are_the_conversation(name: str) -> None:
    tokenizer = TOKENIZERS[name]()
    encoder = ChatEncoder(tokenizer)
    for prompt in ([HI], [HI, YO, WELL]):
        if (name, len(prompt)) == ("stopless", 3):  # see test_or_the_last_turn_alone
            continue
        ids, answer = encoder.prompt(prompt), encoder.answer(prompt, "No.")
        assert answer.scored == [True] * len(answer.tokens)
        turns = "last" if name == "thinking" else "all"
        whole = ChatEncoder(tokenizer, turns=turns).conversation([*prompt, NO])
        assert [*ids, *answer.tokens] == list(whole.tokens)
        assert whole.scored[len(ids) :] == answer.scored


@pytest.mark.parametrize("name", TOKENIZERS)
def test_one_beginning_and_one_end(name: str) -> None:
    tokenizer = TOKENIZERS[name]()
    encoder = ChatEncoder(tokenizer)
    bos, eos = tokenizer.bos_token, tokenizer.eos_token
    conversations = [[*encoder.prompt([HI]), *encoder.answer([HI], "Yo").tokens]]
    if name != "thinking":
        conversations.append(list(encoder.conversation([HI, YO]).tokens))
    spelled = [(hi, yo) for hi in ("Hi", f"{bos}Hi") for yo in ("Yo", f"Yo{eos}")]
    texts = [[*encoder.prompt(hi), *encoder.answer(hi, yo).tokens] for hi, yo in spelled]
    texts += [list(encoder.text(text).tokens) for text in ("Yo", f"{bos}Yo", f"Yo{eos}", f"{bos}Yo{eos}")]
    for ids in texts:
        assert (ids.count(tokenizer.bos_token_id), ids.count(tokenizer.eos_token_id)) == (1, 1)
        assert (ids[0], ids[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    for ids in conversations:
        begins = name in ("plain", "scratch", "llama3")
        assert ids.count(tokenizer.bos_token_id) == begins == (ids[0] == tokenizer.bos_token_id)
        assert sum(ids.count(stop) for stop in encoder.stop_ids) == (2 if STOPS[name][0] in TURN_ENDS else 1)
        assert ids[-1] == encoder.stop_ids[0]


TURN_ENDS = ("<|im_end|>", "<|eot|>", "<|end|>")  # written behind the user's turn too


def test_plain_template_begins_with_bos_where_text_does_and_only_there() -> None:
    tokenizer = beginless()
    assert decoded(tokenizer, ChatEncoder(tokenizer).prompt([HI])) == "User: Hi\n\nAssistant:"
    assert show(tokenizer, ChatEncoder(tokenizer).text("Hi")) == "H[[i<eos>]]"


def test_template_is_carried_along(tmp_path: Path) -> None:
    tokenizer = plain()
    encoder = ChatEncoder(tokenizer)
    tokenizer.save_pretrained(tmp_path)
    again = ChatEncoder(AutoTokenizer.from_pretrained(tmp_path))
    assert again.tokenizer.chat_template == tokenizer.chat_template
    assert again.conversation([HI, YO]) == encoder.conversation([HI, YO])


def test_a_given_template_replaces_the_tokenizers_own() -> None:
    tokenizer = scratch()
    encoder = ChatEncoder(tokenizer, CHATML.replace("<|im_end|>", "<eos>"))
    assert decoded(tokenizer, encoder.prompt([HI])) == "<|im_start|>user\nHi<eos>\n<|im_start|>assistant\n"
    assert encoder.stop_ids == [tokenizer.eos_token_id]


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("chatml.jinja", "does not write what the assistant says, but 'chatml.jinja': it must be a Jinja template"),
        ("", "does not write what the assistant says"),
        ("{% for m in messages %}{{ m.content }}", "cannot write a question and an answer: .*Unexpected end"),
        ("{{ raise_exception('never') }}", "cannot write a question and an answer: .*never"),
        ("{{ messages[7].content.x }}", "cannot write a question and an answer"),
    ],
)
def test_template_that_is_none(template: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        ChatEncoder(scratch(), template)


def test_no_stop_token_at_all() -> None:
    tokenizer = stopless()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no stop token: the tokenizer has no eos_token and the chat template"):
        ChatEncoder(tokenizer)
    tokenizer = chatml()
    tokenizer.eos_token = None
    encoder = ChatEncoder(tokenizer)  # the template's serves for text too
    assert tokenizer.convert_ids_to_tokens(encoder.stop_ids) == ["<|im_end|>"]
    assert show(tokenizer, encoder.answer("Hi", "Yo")) == "[[Yo<|im_end|>]]"
    assert show(tokenizer, encoder.text("Yo")) == "<bos>[[Yo<|im_end|>]]"


def test_special_tokens_before_an_answer_do_not_end_it() -> None:
    tokenizer = thinking()
    encoder = ChatEncoder(tokenizer)
    assert tokenizer.convert_ids_to_tokens(encoder.stop_ids[0]) == "<|im_end|>"
    assert show(tokenizer, encoder.answer([HI], "Yo")) == "[[<think></think>Yo<|im_end|>]]"


def test_blank_added_tokens_do_not_end_an_answer() -> None:
    tokenizer = stopless()
    tokenizer.add_tokens(["\n", "  "])  # as GPT-NeoX's and Gemma's vocabularies have them
    assert show(tokenizer, ChatEncoder(tokenizer).answer([HI], "Yo")) == "[[ Yo<eos>]]"


def test_template_that_changes_earlier_turns() -> None:
    tokenizer = thinking()
    with pytest.raises(BadField, match=r"'messages' are rendered differently by .*set turns: last"):
        ChatEncoder(tokenizer).conversation([HI, YO, WELL, NO])
    last = ChatEncoder(tokenizer, turns="last").conversation([HI, YO, WELL, NO, BYE])
    assert show(tokenizer, last) == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYo<|im_end|>\n"
        "<|im_start|>user\nWell?<|im_end|>\n<|im_start|>assistant\n[[<think></think>No.<|im_end|>]]"
    )
    assert show(tokenizer, ChatEncoder(tokenizer).conversation([HI, YO])).endswith("[[<think></think>Yo<|im_end|>]]")


def test_template_that_drops_its_stop_token() -> None:
    template = CHATML.replace("+ '<|im_end|>\n'", "+ ('' if message['content'] == 'Yo' else '<|im_end|>\n')")
    assert template != CHATML
    with pytest.raises(BadField, match="'messages' are rendered without a stop token"):
        ChatEncoder(chatml(), template).answer([HI], "Yo")


def test_template_that_refuses_a_conversation() -> None:
    encoder = ChatEncoder(strict())
    with pytest.raises(BadField, match="'messages' does not fit the chat template: System role not supported"):
        encoder.conversation([SYSTEM, HI, YO])
    with pytest.raises(BadField, match="'messages' does not fit the chat template: Roles must alternate"):
        encoder.prompt([HI, HI])


def test_what_follows_the_last_answer_is_left_out() -> None:
    encoder = ChatEncoder(scratch())
    assert encoder.conversation([HI, YO, WELL]) == encoder.conversation([HI, YO])


def test_system_and_tool_turns_and_answers_in_a_row() -> None:
    tokenizer = scratch()
    messages = [SYSTEM, HI, YO, turn("tool", "{}"), NO, YO]
    assert show(tokenizer, ChatEncoder(tokenizer).conversation(messages)) == (
        "<bos><system> Be brief. <user> Hi <assistant>[[ Yo <eos>]]<tool> {} <assistant>[[ No. <eos>]]"
        "<assistant>[[ Yo <eos>]]"
    )


def test_a_conversation_that_the_model_begins() -> None:
    tokenizer = scratch()
    encoder = ChatEncoder(tokenizer)
    assert show(tokenizer, encoder.conversation([YO, HI, NO])) == (
        "<bos><assistant> Yo <eos><user> Hi <assistant>[[ No. <eos>]]"
    )
    with pytest.raises(BadField, match="'messages' have no assistant turn that answers something"):
        encoder.conversation([YO, HI])


def test_the_first_token_of_all_is_never_scored() -> None:
    tokenizer = scratch()
    bare = "{% for message in messages %}{{ message['content'] + (eos_token if loop.index0 % 2 else '') }}{% endfor %}"
    segment = ChatEncoder(tokenizer, bare).conversation([turn("user", ""), YO])
    assert show(tokenizer, segment) == "Y[[o<eos>]]"


def test_empty_answers_are_scored_on_the_stop_token() -> None:
    tokenizer = chatml()
    encoder = ChatEncoder(tokenizer)
    assert show(tokenizer, encoder.answer([HI], "")) == "[[<|im_end|>]]"
    assert show(tokenizer, encoder.answer("Hi", "")) == "[[<eos>]]"
    assert show(tokenizer, encoder.conversation([HI, turn("assistant", "")])).endswith("assistant\n[[<|im_end|>]]")


def test_an_answer_that_was_cut_gets_no_stop_token() -> None:
    tokenizer = chatml()
    encoder = ChatEncoder(tokenizer)
    assert show(tokenizer, encoder.answer([HI], "Yo", finished=False)) == "[[Yo]]"
    assert show(tokenizer, encoder.answer("Hi", "Yo", finished=False)) == "[[Yo]]"


@pytest.mark.parametrize("name", ["chatml", "llama3", "plain", "scratch"])
def test_content_that_spells_the_stop_token_does_not_end_a_turn_early(name: str) -> None:
    tokenizer = TOKENIZERS[name]()
    encoder = ChatEncoder(tokenizer)
    stop = STOPS[name][0]
    shown = show(tokenizer, encoder.conversation([HI, turn("assistant", f"a{stop}b"), WELL, NO]))
    assert f"a{stop}b" in shown.split("[[")[1].split("]]")[0]
    assert shown.count("[[") == 2
    assert shown.endswith(f"{stop}]]")


def test_a_prompt_of_no_tokens() -> None:
    encoder = ChatEncoder(beginless())
    with pytest.raises(BadField, match="'prompt' comes out as no tokens"):
        encoder.prompt("")


def test_words() -> None:
    tokenizer = word_tokenizer(["hi", "yo", "well", "no"])
    segment = ChatEncoder(tokenizer).conversation([turn("user", "hi"), turn("assistant", "yo zzz")])
    assert tokenizer.convert_ids_to_tokens(segment.tokens) == "<bos> <user> hi <assistant> yo <unk> <eos>".split()
    assert segment.scored == [False] * 4 + [True] * 3


CORPUS = ["User: Hi\n\nAssistant: Yo, so it is.\n\nUser: So?\n\nAssistant:\nNo.\n <eos>\n\n"] * 20
TEXT = st.text(st.sampled_from("Hi soYno.:\nU "), max_size=12)


@fuzz
@given(st.sampled_from(["plain", "scratch", "chatml", "llama3", "strict"]), st.lists(TEXT, min_size=4, max_size=4))
def test_training_sees_the_tokens_that_generation_does(name: str, contents: list[str]) -> None:
    """A vocabulary with merges: no token straddles the border between what is given and what is learnt."""
    tokenizer = TOKENIZERS[name]()
    tokenizer.backend_tokenizer.model = MERGES.backend_tokenizer.model
    encoder = ChatEncoder(tokenizer)
    messages = [turn("user" if i % 2 == 0 else "assistant", content) for i, content in enumerate(contents)]
    whole = encoder.conversation(messages)
    ends = [i for i, token in enumerate(whole.tokens) if whole.scored[i] and token == encoder.stop_ids[0]]
    begins = [i for i, scored in enumerate(whole.scored) if scored and not whole.scored[i - 1]]
    assert len(ends) == len(begins) == 2
    assert list(whole.tokens[: begins[0]]) == encoder.prompt(messages[:1])
    assert whole.tokens[begins[0] : ends[0] + 1] == encoder.answer(messages[:1], contents[1]).tokens
    assert whole.tokens[begins[1] : ends[1] + 1] == encoder.answer(messages[:3], contents[3]).tokens
    # In the prompt of a later turn the earlier answers are text again, and may merge with what stands before them.
    assert decoded(tokenizer, whole.tokens[: begins[1]]) == decoded(tokenizer, encoder.prompt(messages[:3]))
    if name == "scratch":
        assert list(whole.tokens[: begins[1]]) == encoder.prompt(messages[:3])


def test_special_tokens_that_swallow_blanks_do_so_between_turns_too() -> None:
    tokenizer = chatml()
    # Phi-3's: the line break behind the token belongs to it.
    tokenizer.add_tokens([AddedToken("<|im_end|>", rstrip=True, special=True)], special_tokens=True)
    encoder = ChatEncoder(tokenizer)
    whole = encoder.conversation([HI, YO, WELL, NO])
    prompt = encoder.prompt([HI, YO, WELL])
    assert list(whole.tokens[: len(prompt)]) == prompt
    assert tokenizer("<|im_end|>\nHi", add_special_tokens=False)["input_ids"][1:] == encoder.tokens("Hi")


MERGES = bpe_tokenizer(CORPUS, 320)


@pytest.mark.parametrize(
    "damaged",
    ["[" * 100_000, "[1, 2]", '{"model_type": "qwen3", "hidden_size": "x"}', '{"model_type": "llama"'],
    ids=len,
)
def test_a_damaged_folder_is_one_line(damaged: str, tmp_path: Path) -> None:
    folder = Path(tiny_folder(tmp_path / "model"))
    (folder / "config.json").write_text(damaged)
    with pytest.raises(ValueError, match=r"data\.tokenizer: the folder .*model' cannot be read") as told:
        load_encoder(str(folder), None, "all", "auto", False, None)
    assert "\n" not in str(told.value)
