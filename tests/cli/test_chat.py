"""A conversation in the terminal."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.tiny import tiny_folder
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_align.cli.chatting import HELP, Chat, converse
from lit_align.cli.entry import main
from lit_align.models import Lora, Network, export, load_causal_lm, load_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_folder(tmp_path_factory.mktemp("chat") / "model")


# Kills: what was said before left out; the prompt given back with the answer; the generation prompt left out.
def test_an_answer_is_the_models_to_all_that_was_said(folder: str) -> None:
    chat = Chat(folder, temperature=0.0, max_new_tokens=4)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    messages: list[dict[str, str]] = []
    for text in ("Hi", "And?"):
        messages.append({"role": "user", "content": text})
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
        expected = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True).strip()
        assert chat.say(text) == expected
        messages.append({"role": "assistant", "content": expected})
    assert chat.messages == messages
    chat.new()
    assert chat.messages == []


def test_an_adapter_answers_with_its_own_stop_tokens(folder: str, tmp_path: Path) -> None:
    network = Network(folder, lora=Lora(r=2, export="adapter"))
    out = export(load_causal_lm(network), load_tokenizer(folder), tmp_path / "out", stop_ids=[77], adapter=True)
    chat = Chat(str(out), temperature=0.0, max_new_tokens=4)
    assert 77 in chat.model.generation_config.eos_token_id
    assert chat.say("Hi") == Chat(folder, temperature=0.0, max_new_tokens=4).say("Hi")  # nothing was trained


def test_temperature_samples(folder: str) -> None:
    chat = Chat(folder, temperature=1.5, max_new_tokens=8)
    answers = set()
    for _ in range(8):
        chat.new()
        answers.add(chat.say("Hi"))
    assert len(answers) > 1


def test_a_conversation(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    chat = Chat(folder, temperature=0.0, max_new_tokens=6)
    converse(chat, ["Hi\n", "/new", "Hi", "/quit", "never"])
    first, *answers = capsys.readouterr().out.splitlines()
    assert first == HELP
    assert len(chat.messages) == 2
    assert chat.messages[1]["content"] == answers[-1].strip()
    converse(chat, ["", "never"])
    assert len(chat.messages) == 2


def test_the_command(folder: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    said = iter(["Hi"])

    def asked(prompt: str) -> str:
        try:
            return next(said)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", asked)
    main(["chat", folder, "--temperature", "0", "--max-new-tokens", "5"])
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_what_cannot_be_talked_to(folder: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot load the tokenizer of '.*nowhere'"):
        main(["chat", str(tmp_path / "nowhere")])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no chat template: it was not trained to answer"):
        main(["chat", str(tmp_path)])
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="cannot load"):
        main(["chat", str(tmp_path)])
