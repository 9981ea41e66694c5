"""A server that scores completions over HTTP, as a reward."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lit_align.data.source import expand
from lit_align.rewards.patience import TryAgain, patiently, within
from lit_align.rewards.protocol import Reward, checked, named
from lit_align.types import Rollout
from lit_align.utils.display import printable
from lit_align.utils.secret import redact_text, redacted

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
        url, headers = self._address()
        stop = threading.Event()
        pool = ThreadPoolExecutor(self.workers, "reward")
        try:
            return torch.cat(
                list(pool.map(lambda part: self._scores(part, url, headers, stop), rollout.split(self.batch_size)))
            )
        finally:  # after an error the requests that wait are not sent, and those under way not tried again
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)

    def _scores(self, rollout: Rollout, url: str, headers: dict[str, str], stop: threading.Event) -> Tensor:
        prompts = f"the prompts: {named(rollout.rows)}"
        body = json.dumps(self._asked(rollout), default=str).encode()
        request = urllib.request.Request(url, body, {"Content-Type": "application/json", **headers})
        try:
            answer = patiently(lambda: post(request, self.timeout), self.title, self.retries, self.pause, stop)
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


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """urllib would follow a POST by a GET without its body."""

    def redirect_request(self, *request: Any) -> None:
        """Nowhere: the status becomes an error."""


# Scores are short: what is longer is no answer, or one that never ends.
LARGEST_ANSWER = 16 << 20


def post(request: urllib.request.Request, timeout: float) -> bytes:
    """One attempt: the body of the answer.

    Args:
        request: what to send.
        timeout: seconds for all of it, whatever the server sends meanwhile: connecting, headers and body.

    Raises:
        TryAgain: no answer in time, a broken connection, or a status of 408, 429 or 5xx.
        Refused: another status, or an answer of more than `LARGEST_ANSWER` bytes.
    """
    sockets = _Sockets()
    try:
        # A socket's own limit is on each of its silences: a server that drips would never meet it.
        return within(timeout, lambda: _attempt(request, timeout, sockets))
    except TimeoutError as error:
        raise TryAgain(f"no answer within {timeout:g} s") from error
    finally:
        sockets.close()


class _Sockets:
    """The connections of one attempt, so that what still reads from them can be ended."""

    def __init__(self) -> None:
        self._open: list[socket.socket] = []
        self._closed = False
        self._lock = threading.Lock()

    def add(self, made: socket.socket) -> None:
        """Keep one; once they are closed, it is closed too."""
        with self._lock:
            self._open.append(made)
        if self._closed:
            self.close()

    def close(self) -> None:
        """Wake the thread that waits for the server: its read ends."""
        with self._lock:
            self._closed = True
            for made in self._open:
                with contextlib.suppress(OSError):
                    made.shutdown(socket.SHUT_RDWR)
            self._open.clear()

    def opener(self) -> urllib.request.OpenerDirector:
        """An opener whose connections are kept here."""
        add = self.add

        class Plain(http.client.HTTPConnection):
            def connect(self) -> None:
                super().connect()
                add(self.sock)

        class Secure(http.client.HTTPSConnection):
            def connect(self) -> None:
                super().connect()
                add(self.sock)

        class HTTP(urllib.request.HTTPHandler):
            def http_open(self, request: urllib.request.Request) -> Any:
                return self.do_open(Plain, request)

        class HTTPS(urllib.request.HTTPSHandler):
            def https_open(self, request: urllib.request.Request) -> Any:
                return self.do_open(Secure, request)

        return urllib.request.build_opener(_NoRedirect, HTTP, HTTPS)


def _attempt(request: urllib.request.Request, timeout: float, sockets: _Sockets) -> bytes:
    """See `post`; the time is for each silence of the server."""
    try:
        with sockets.opener().open(request, timeout=timeout) as response:
            pieces, size = [], 0
            while piece := response.read1(1 << 16):
                pieces.append(piece)
                size += len(piece)
                if size > LARGEST_ANSWER:
                    raise Refused(f"an answer of more than {LARGEST_ANSWER:,} bytes")
            return b"".join(pieces)
    except urllib.error.HTTPError as error:
        with error:
            said = printable(f"status {error.code} ({error.reason})")
            if moved := error.headers.get("Location"):
                place = redact_text(printable(moved.split("?")[0]))
                raise Refused(f"{said}, which moves it to {place}: give that as url") from error
            if error.code not in (408, 429) and error.code < 500:
                raise Refused(f"{said}: {_beginning(error)!r}") from error
            raise TryAgain(said, _seconds(error.headers.get("Retry-After"))) from error
    except urllib.error.URLError as error:
        if isinstance(error.reason, TimeoutError):
            raise error.reason from error
        raise TryAgain(printable(error.reason)) from error
    except TimeoutError:
        raise
    except (OSError, http.client.HTTPException) as error:
        raise TryAgain(printable(f"{type(error).__name__}: {error}")) from error


def _beginning(error: urllib.error.HTTPError) -> str:
    try:
        return error.read(200).decode(errors="replace")
    except (OSError, http.client.HTTPException):
        return ""


def _seconds(after: str | None) -> float | None:
    """What Retry-After asks for, if it is a number; it may be a date."""
    return float(after) if after is not None and after.strip().isdecimal() else None
