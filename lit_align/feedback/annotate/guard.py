"""What stands before the page: tokens, origins, hosts, sizes, rates, and the headers of every answer."""

from __future__ import annotations

import asyncio
import base64
import hmac
import json
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from pathlib import Path
from typing import Any

from lit_align.utils.secret import write_private

LARGEST_BODY = 64 << 10  # bytes of a request
SLOWEST_BODY = 10.0  # seconds until it must have come
LOOPBACK = ("localhost", "127.0.0.1", "::1")
ADMINISTRATOR = "\0administrator"  # no annotator can have this name

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), microphone=(), geolocation=()",
    "cache-control": "no-store",
}


class Tokens:
    """Private tokens of annotators and of the administrator, derived from one key.

    Only the key is kept, in a file that its owner alone can read: the same links hold after a restart, and a new key
    ends all of them. A token travels in the part of a link after #, which browsers never send, and in a header.

    Args:
        key: at least 16 bytes.
        names: of the annotators.
    """

    def __init__(self, key: bytes, names: Iterable[str]) -> None:
        if len(key) < 16:
            raise ValueError("the key of the tokens must have at least 16 bytes")
        self._of = {name: self._derive(key, name) for name in (*names, ADMINISTRATOR)}

    @staticmethod
    def _derive(key: bytes, name: str) -> str:
        digest = hmac.digest(key, name.encode("utf-8", "surrogatepass"), "sha256")
        return base64.urlsafe_b64encode(digest[:24]).decode()

    def __getitem__(self, name: str) -> str:
        return self._of[name]

    def whose(self, header: str | None) -> str | None:
        """Whose token an Authorization header holds; compared with every token in constant time."""
        scheme, _, told = (header or "").partition(" ")
        given = told.strip().encode("utf-8", "surrogateescape")
        found = None
        for name, token in self._of.items():
            if hmac.compare_digest(given, token.encode()):
                found = name
        return found if scheme.lower() == "bearer" else None


def key_in(path: Path) -> bytes:
    """The key in a file; a new one is drawn where there is no such file.

    Raises:
        ValueError: the file holds something else; names it.
    """
    if not path.exists():
        write_private(path, secrets.token_hex(32) + "\n")
    text = path.read_text().strip()
    if not re.fullmatch(r"[0-9a-f]{64}", text):
        raise ValueError(f"{path} is not a key of lit-align annotate: remove it, and all links change")
    return bytes.fromhex(text)


class Rates:
    """A token bucket for each name: `rate` requests a second, and up to `burst` at once.

    Args:
        rate: requests a second.
        burst: requests that may come at once.
        clock: seconds.
        most: names that are remembered; the longest unheard is forgotten.
    """

    def __init__(
        self, rate: float, burst: float, clock: Callable[[], float] = time.monotonic, most: int = 10_000
    ) -> None:
        self.rate, self.burst, self._clock, self._most = rate, burst, clock, most
        self._of: dict[str, tuple[float, float]] = {}

    def wait(self, name: str) -> float:
        """Take one request; return 0, or the seconds until there is room for one, and take none."""
        now = self._clock()
        level, then = self._of.pop(name, (self.burst, now))
        level = min(self.burst, level + (now - then) * self.rate)
        short = level < 1
        self._of[name] = (level if short else level - 1, now)
        if len(self._of) > self._most:
            del self._of[next(iter(self._of))]
        return (1 - level) / self.rate if short else 0.0


class Guard:
    """ASGI middleware: refuses what must not reach the page, and adds headers to every answer.

    Args:
        app: what is guarded.
        tokens: who may ask.
        hosts: names under which the page is reached; a request for another one is of a page that tricked the browser
            (DNS rebinding).
        rate: requests a second of one annotator, and tries of wrong tokens of one address in ten seconds.
    """

    def __init__(self, app: Any, tokens: Tokens, hosts: Iterable[str], rate: float = 10.0) -> None:
        self.app = app
        self.tokens = tokens
        self.hosts = {host.lower() for host in hosts}
        self._asked = Rates(rate, 4 * rate)
        self._anonymous = Rates(5 * rate, 20 * rate)
        self._wrong = Rates(rate / 10, rate)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or hand on."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":  # websockets: the page has none
            await send({"type": "websocket.close", "code": 1008})
            return

        async def sending(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                kept = [(k, v) for k, v in message["headers"] if k.decode().lower() not in HEADERS]
                message["headers"] = kept + [(k.encode(), v.encode()) for k, v in HEADERS.items()]
            await send(message)

        headers = {k.decode("latin-1").lower(): v.decode("latin-1") for k, v in scope["headers"]}
        refused = self._refusal(scope, headers)
        if refused is not None:
            await _answer(sending, *refused)
            return
        body = b""
        if scope["method"] == "POST":
            try:
                body = await asyncio.wait_for(_body(receive), SLOWEST_BODY)
            except ValueError:
                await _answer(sending, 413, f"a request holds at most {LARGEST_BODY:,} bytes")
                return
            except TimeoutError:
                await _answer(sending, 408, "the request did not come to its end in time")
                return
        sent = False

        async def receiving() -> MutableMapping[str, Any]:
            nonlocal sent
            if sent:
                return await receive()
            sent = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self.app(scope, receiving, sending)

    def _refusal(self, scope: Scope, headers: dict[str, str]) -> tuple[int, str, float] | None:
        """Status, reason and seconds to wait, where a request is refused; otherwise `scope` gets its annotator."""
        address = (scope.get("client") or ("unknown", 0))[0]
        if host_of(headers.get("host", "")) not in self.hosts:
            return 421, "this page is not served under that host: start lit-align annotate with --allow-host", 0
        if scope["method"] not in ("GET", "HEAD", "POST"):
            return 405, "method not allowed", 0
        if not scope["path"].startswith("/api/"):
            wait = self._anonymous.wait(address)
            return (429, "too many requests", wait) if wait else None
        origin, site = headers.get("origin"), headers.get("sec-fetch-site")
        foreign = origin is not None and origin.lower().partition("://")[2] != headers.get("host", "").lower()
        if foreign or site not in (None, "same-origin", "none"):
            return 403, "requests of another origin are refused", 0
        name = self.tokens.whose(headers.get("authorization"))
        if name is None:
            wait = self._wrong.wait(address)
            return (429, "too many wrong tokens", wait) if wait else (401, "open your own link: the token is wrong", 0)
        if scope["path"].startswith("/api/admin/") != (name == ADMINISTRATOR):
            return 403, "this token does not open that", 0
        if wait := self._asked.wait(name):
            return 429, "too many requests", wait
        if scope["method"] == "POST":
            if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
                return 415, "expected application/json", 0
            length = headers.get("content-length", "0")
            if not length.isdecimal() or int(length) > LARGEST_BODY:
                return 413, f"a request holds at most {LARGEST_BODY:,} bytes", 0
        scope["annotator"] = name
        return None


def host_of(header: str) -> str:
    """The name in a Host header, without its port and brackets."""
    found = re.fullmatch(r"\[([0-9a-f:.]+)\](?::\d+)?|([^:\s/]+)(?::\d+)?", header.strip().lower())
    return (found[1] or found[2]) if found else ""


async def _body(receive: Receive) -> bytes:
    """The body of a request.

    Raises:
        ValueError: it is too large.
    """
    pieces, size = [], 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return b""
        piece = message.get("body", b"")
        size += len(piece)
        if size > LARGEST_BODY:
            raise ValueError("too large")
        pieces.append(piece)
        if not message.get("more_body"):
            return b"".join(pieces)


async def _answer(send: Send, status: int, reason: str, wait: float = 0.0) -> None:
    body = json.dumps({"error": reason}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if wait:
        headers.append((b"retry-after", str(int(wait) + 1).encode()))
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
