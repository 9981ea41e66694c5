"""A server that scores completions over HTTP, as a reward."""

from __future__ import annotations

import asyncio
import json
import os
import re
import threading
from collections.abc import Coroutine, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lit_align.data.source import expand
from lit_align.rewards.patience import Attempts, TryAgain
from lit_align.rewards.protocol import Reward, checked, named
from lit_align.types import Rollout
from lit_align.utils.display import printable
from lit_align.utils.secret import redact_text, redacted

if TYPE_CHECKING:
    from aiohttp import ClientResponse, ClientSession

T = TypeVar("T")
_UNPRINTABLE = re.compile(r"[\x00-\x20\x7f]")


class EndpointReward(Reward):
    """Scores completions by asking a server, in batches.

    A request is a POST of JSON, `{"prompts": [...], "completions": [...]}` with one entry for each completion: the
    prompt as its row has it, text or messages of role and content; and each of `columns` beside them under its name.
    The answer is JSON too: `{"scores": [...]}`, or the list alone, one number for each completion in their order.

    Args:
        url: http or https; environment variables are filled in, and messages show it without their values.
        columns: what else to send of the prompts' rows, as in `[reference]`.
        batch_size: completions in a request.
        workers: requests under way at once.
        timeout: seconds that an attempt may take, from connecting to the last byte.
        retries: further attempts after a time-out, a broken connection, or a status of 408, 429 or 5xx.
        pause: seconds before the first of them, doubled each time; a Retry-After of the server's counts instead.
        headers: sent with each request. Environment variables are filled in, and `{Authorization: "Bearer ${TOKEN}"}`
            keeps the secret out of the run's configuration.
    """

    def __init__(
        self,
        url: str,
        columns: Sequence[str] = (),
        batch_size: int = 64,
        workers: int = 1,
        timeout: float = 60.0,
        retries: int = 3,
        pause: float = 1.0,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__()
        if min(batch_size, workers) < 1 or timeout <= 0 or retries < 0 or pause < 0:
            raise ValueError(
                "EndpointReward: batch_size and workers must be at least 1, timeout above 0, retries and pause not "
                f"negative; got {batch_size}, {workers}, {timeout}, {retries} and {pause}"
            )
        if {"prompts", "completions"} & set(columns):
            raise ValueError("EndpointReward: prompts and completions are sent in any case: take them out of columns")
        self.url, self.columns, self.headers = url, list(columns), dict(headers or {})
        self.batch_size, self.workers = batch_size, workers
        self.timeout, self.retries, self.pause = timeout, retries, pause

    @property
    def title(self) -> str:
        """With its address."""
        return f"the reward at {redact_text(self.url)}"

    def load(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Find out now whether a variable of the environment is missing."""
        self._address()

    def _address(self) -> tuple[str, dict[str, str]]:
        url, headers = expand(self.url), {name: expand(value) for name, value in self.headers.items()}
        # What http.client has to say of these repeats the value, which may be secret.
        wrong = f"EndpointReward: {redact_text(self.url)!r} is no address: it"
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"{wrong} must begin with http:// or https://")
        if "@" in urlsplit(url).netloc:
            raise ValueError(f"{wrong} holds a user or a password: send them in headers")
        if _UNPRINTABLE.search(url):
            raise ValueError(f"{wrong} holds white space once its variables are filled in")
        for name, value in headers.items():
            if "\n" in value or "\r" in value:
                shown = redacted(self.headers, "headers")[name]
                raise ValueError(f"EndpointReward: the header {name} has a line's end in it: {shown!r}")
        return url, headers

    def forward(self, rollout: Rollout) -> Tensor:
        """Shape (Q,).

        Raises:
            ValueError: the server answers something else than a finite number for each completion, or refuses the
                request; names the prompts.
            ConnectionError: no answer, whatever the retries; names the prompts.
        """
        return torch.cat(run_in_thread(self._all_scores(rollout.split(self.batch_size))))

    async def _all_scores(self, parts: Sequence[Rollout]) -> list[Tensor]:
        """Ask for the scores of all parts, `workers` at a time; the first error cancels the other requests."""
        import aiohttp  # only here: a run without this reward need not wait for the import

        url, headers = self._address()
        free = asyncio.Semaphore(self.workers)
        timeout = aiohttp.ClientTimeout(total=self.timeout)
        connector = aiohttp.TCPConnector(limit=self.workers, force_close=True)
        async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:

            async def scores(part: Rollout) -> Tensor:
                async with free:
                    return await self._scores(part, session, url, headers)

            tasks = [asyncio.create_task(scores(part)) for part in parts]
            try:
                return list(await asyncio.gather(*tasks))
            finally:
                for task in tasks:
                    task.cancel()

    async def _scores(self, rollout: Rollout, session: ClientSession, url: str, headers: dict[str, str]) -> Tensor:
        prompts = f"the prompts: {named(rollout.rows)}"
        body = json.dumps(self._asked(rollout), default=str).encode()
        attempts = Attempts(self.title, self.retries, self.pause)
        try:
            while True:
                try:
                    answer = await post(session, url, body, {"Content-Type": "application/json", **headers})
                    break
                except TryAgain as problem:
                    await asyncio.sleep(attempts.wait_after(problem))
        except TryAgain as problem:
            raise ConnectionError(f"{problem}; {prompts}") from problem
        except Refused as problem:
            raise ValueError(f"{self.title} refuses the request with {problem}; {prompts}") from problem
        try:
            scores = json.loads(answer)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{self.title} answered {answer[:80]!r}, which is no JSON; {prompts}") from error
        if isinstance(scores, dict):
            if "scores" not in scores:
                raise ValueError(f"{self.title} answered {answer[:80]!r}, which has no `scores`; {prompts}")
            scores = scores["scores"]
        return checked(scores, rollout, self.title)

    def _asked(self, rollout: Rollout) -> dict[str, list[Any]]:
        for column in self.columns:
            for row in rollout.rows:
                if column not in row:
                    raise ValueError(f"EndpointReward sends the column {column!r}; the row has {', '.join(row)}")
        asked: dict[str, list[Any]] = {"prompts": [row.get("prompt") for row in rollout.rows]}
        asked["completions"] = rollout.texts
        return asked | {column: [row[column] for row in rollout.rows] for column in self.columns}


class Refused(Exception):
    """A status that another attempt would not change."""


# Scores are short: what is longer is no answer, or one that never ends.
LARGEST_ANSWER = 16 << 20


async def post(session: ClientSession, url: str, body: bytes, headers: dict[str, str]) -> bytes:
    """Make one attempt; returns the body of the answer.

    Args:
        session: its total time-out is for the whole attempt, whatever the server sends meanwhile.
        url: where to.
        body: JSON.
        headers: beside those of HTTP.

    Raises:
        TryAgain: no answer in time, a broken connection, or a status of 408, 429 or 5xx.
        Refused: another status, or an answer of more than `LARGEST_ANSWER` bytes.
    """
    import aiohttp

    # Not `trust_env`, which would also send a password from ~/.netrc.
    proxy = _proxy(url)
    try:
        async with session.post(url, data=body, headers=headers, proxy=proxy, allow_redirects=False) as response:
            said = printable(f"status {response.status} ({response.reason})")
            if response.status < 300:
                return await _read(response)
            if moved := response.headers.get("Location"):
                place = redact_text(printable(moved.split("?")[0]))
                raise Refused(f"{said}, which moves it to {place}: give that as url")
            if response.status in (408, 429) or response.status >= 500:
                raise TryAgain(said, _seconds(response.headers.get("Retry-After")))
            raise Refused(f"{said}: {(await response.content.read(200)).decode(errors='replace')!r}")
    except TimeoutError as error:
        raise TryAgain(f"no answer within {session.timeout.total:g} s") from error
    except aiohttp.InvalidURL as error:
        raise Refused("no answer: it is no address") from error  # without its value, which may be secret
    except aiohttp.ClientConnectorError as error:
        raise TryAgain(os.strerror(error.errno) if error.errno else "no connection") from error
    except (aiohttp.ClientError, OSError) as error:
        reason = " ".join(str(error).split())
        raise TryAgain(printable(f"{type(error).__name__}: {reason}")) from error


async def _read(response: ClientResponse) -> bytes:
    pieces, size = [], 0
    async for piece in response.content.iter_chunked(1 << 16):
        pieces.append(piece)
        size += len(piece)
        if size > LARGEST_ANSWER:
            raise Refused(f"an answer of more than {LARGEST_ANSWER:,} bytes")
    return b"".join(pieces)


def _proxy(url: str) -> str | None:
    """The proxy that the environment names for an address."""
    parts = urlsplit(url)
    return None if proxy_bypass(parts.hostname or "") else getproxies().get(parts.scheme)


def _seconds(after: str | None) -> float | None:
    """What Retry-After asks for, if it is a number; it may be a date."""
    return float(after) if after is not None and after.strip().isdecimal() else None


def run_in_thread(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine in a thread of its own: the caller's may have a loop, and a signal interrupts the wait alone."""
    loop = asyncio.new_event_loop()
    task = loop.create_task(coroutine)
    result: Future[T] = Future()

    def run() -> None:
        try:
            result.set_result(loop.run_until_complete(task))
        except BaseException as error:
            result.set_exception(error)
        finally:
            loop.close()

    threading.Thread(target=run, name="reward", daemon=True).start()
    try:
        return result.result()
    finally:
        if not result.done():
            loop.call_soon_threadsafe(task.cancel)
