"""Who answers a judge's questions: a chat server, or a model's folder."""

from __future__ import annotations

import asyncio
import json
import os
from typing import Any, NamedTuple, Protocol

from lit_align.rewards.endpoint import Refused, post, run_in_thread
from lit_align.rewards.patience import Attempts, TryAgain
from lit_align.utils.secret import redact_text

Messages = list[dict[str, str]]


class Answer(NamedTuple):
    """A text, and the tokens of the question and of the text."""

    text: str
    asked: int
    said: int


class Answerer(Protocol):
    """Answers a conversation; the same attempt at the same conversation gives the same answer where that can be."""

    name: str

    def answer(self, messages: Messages, attempt: int) -> Answer:
        """The answer to a conversation; an attempt above 0 is another try at the same one."""
        ...


class Endpoint:
    """A server that speaks OpenAI's chat completions.

    Args:
        url: such as http://127.0.0.1:8000/v1; `/chat/completions` is added.
        model: name of the model there.
        key_variable: environment variable that holds the key; null for none.
        max_tokens: of an answer.
        timeout: seconds that an attempt may take.
        retries: further attempts after a time-out, a broken connection, or a status of 408, 429 or 5xx.

    Raises:
        ValueError: the address is none, or the variable is not set.
    """

    def __init__(
        self, url: str, model: str, key_variable: str | None = None, max_tokens: int = 512, timeout: float = 120.0,
        retries: int = 4,
    ) -> None:  # fmt: skip
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"--endpoint {redact_text(url)!r} must begin with http:// or https://")
        if key_variable and not os.environ.get(key_variable):
            raise ValueError(f"--key-variable {key_variable}: the environment variable is not set")
        self.url, self.name = url.rstrip("/") + "/chat/completions", model
        self.key_variable, self.max_tokens, self.timeout, self.retries = key_variable, max_tokens, timeout, retries

    def answer(self, messages: Messages, attempt: int) -> Answer:
        """See `Answerer`; the first attempt is greedy, further ones are sampled.

        Raises:
            ValueError: the server refuses the request, or answers something else than a chat completion.
            ConnectionError: no answer, whatever the retries.
        """
        asked = {"model": self.name, "messages": messages, "temperature": 0.7 if attempt else 0.0}
        body = json.dumps({**asked, "seed": attempt, "max_tokens": self.max_tokens}).encode()
        headers = {"Content-Type": "application/json"}
        if self.key_variable:
            headers["Authorization"] = f"Bearer {os.environ[self.key_variable]}"
        title = f"the judge at {redact_text(self.url)}"
        try:
            told = run_in_thread(self._ask(body, headers, title))
        except TryAgain as problem:
            raise ConnectionError(str(problem)) from problem
        except Refused as problem:
            raise ValueError(f"{title} refuses the request with {problem}") from problem
        try:
            content = json.loads(told)
            text, usage = content["choices"][0]["message"]["content"], content.get("usage") or {}
            counts = (int(usage.get("prompt_tokens") or 0), int(usage.get("completion_tokens") or 0))
        except (ValueError, KeyError, IndexError, TypeError, RecursionError) as error:
            raise ValueError(f"{title} answered {told[:80]!r}, which is no chat completion") from error
        return Answer(text if isinstance(text, str) else "", *counts)

    async def _ask(self, body: bytes, headers: dict[str, str], title: str) -> bytes:
        import aiohttp  # only here: a judge in a folder need not wait for the import

        attempts = Attempts(title, self.retries, 1.0)
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=self.timeout)) as session:
            while True:
                try:
                    return await post(session, self.url, body, headers)
                except TryAgain as problem:
                    await asyncio.sleep(attempts.wait_after(problem))


class Folder:
    """A language model's folder.

    Args:
        folder: as `lit-align fit` exports it, with a chat template.
        max_tokens: of an answer.

    Raises:
        ValueError: there is no such model, or it has no chat template.
    """

    def __init__(self, folder: str, max_tokens: int = 512) -> None:
        from lit_align.models.load import device_of, load_causal_lm, load_tokenizer
        from lit_align.models.network import Network

        self.name, self.max_tokens = folder, max_tokens
        self.tokenizer: Any = load_tokenizer(folder)
        if self.tokenizer.chat_template is None:
            raise ValueError(f"{folder!r} has no chat template: it was not trained to answer")
        device = device_of("auto")
        network = Network(folder, dtype="float32" if device.type == "cpu" else "bfloat16", attention="sdpa")
        self.model: Any = load_causal_lm(network).eval().to(device)

    def answer(self, messages: Messages, attempt: int) -> Answer:
        """See `Answerer`; the first attempt is greedy, further ones are sampled."""
        import torch

        inputs = self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).to(self.model.device)
        sampled: dict[str, Any] = {"do_sample": True, "temperature": 0.7} if attempt else {"do_sample": False}
        asked = inputs["input_ids"].shape[1]
        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(attempt)
            output = self.model.generate(**inputs, max_new_tokens=self.max_tokens, **sampled)
        said = output[0, asked:]
        return Answer(self.tokenizer.decode(said, skip_special_tokens=True), asked, len(said))
