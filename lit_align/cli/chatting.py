"""Talk to a model in the terminal: `lit-align chat FOLDER`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, TextStreamer

from lit_align.models.load import device_of, load_causal_lm, load_tokenizer
from lit_align.models.network import Network
from lit_align.utils.bounds import at_most
from lit_align.utils.display import printable
from lit_align.utils.model_folder import find_model


class _Escaped(TextStreamer):
    """Stream a completion to the terminal with control characters escaped."""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Print the text that further tokens cannot change."""
        print(printable(text, lines=True), flush=True, end="\n" if stream_end else "")


HELP = "/new begins a new conversation, /quit or an empty line ends"


class Chat:
    """A conversation with a model. Completions use its chat template and end at its stop tokens.

    Args:
        name: folder of a model, a run or a pipeline (its last language model), or a name on the hub.
        temperature: sampling temperature; 0 takes the most probable token.
        max_new_tokens: maximum length of a completion, in tokens.
        system: system message, if the template takes one.

    Raises:
        ValueError: the model does not exist or has no chat template.
    """

    def __init__(
        self, name: str, temperature: float = 0.7, max_new_tokens: int = 256, system: str | None = None
    ) -> None:
        name = find_model(name, last=True)
        self.tokenizer: Any = load_tokenizer(name)
        if self.tokenizer.chat_template is None:
            raise ValueError(f"{name!r} has no chat template: it was not trained to answer")
        told = Path(name, "adapter_config.json")
        base = json.loads(told.read_text())["base_model_name_or_path"] if told.exists() else name
        device = device_of("auto")
        network = Network(base, dtype="float32" if device.type == "cpu" else "bfloat16", attention="sdpa")
        self.model: Any = load_causal_lm(network)
        if told.exists():
            self.model.load_adapter(name)
            self.model.generation_config = GenerationConfig.from_pretrained(name)
        self.model = self.model.eval().to(device)
        self.begin = [{"role": "system", "content": system}] if system else []
        self.messages = list(self.begin)
        sampled = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
        self.options = {"max_new_tokens": max_new_tokens, **sampled}

    def new(self) -> None:
        """Start a new conversation."""
        self.messages = list(self.begin)

    def say(self, text: str, streamer: TextStreamer | None = None) -> str:
        """Add a user message and return the model's completion."""
        self.messages.append({"role": "user", "content": text})
        with at_most():
            inputs = self.tokenizer.apply_chat_template(
                self.messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        inputs = inputs.to(self.model.device)
        with torch.no_grad():
            output = self.model.generate(**inputs, **self.options, streamer=streamer)
        answer: str = self.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        self.messages.append({"role": "assistant", "content": answer})
        return answer


def converse(chat: Chat, lines: Iterable[str], write: Callable[[str], Any] = print) -> None:
    """Answer each line until the lines end or one is empty."""
    write(HELP)
    for line in lines:
        text = line.strip()
        if text in ("", "/quit"):
            return
        if text == "/new":
            chat.new()
            continue
        before = len(chat.messages)
        try:
            chat.say(text, _Escaped(chat.tokenizer, skip_prompt=True, skip_special_tokens=True))
        except KeyboardInterrupt:  # stops the completion; at the prompt, Ctrl-C ends the conversation
            del chat.messages[before:]
            write(" (stopped, and not remembered)")
