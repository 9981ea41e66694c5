"""A server that drips, floods or nests: a time-out is for the whole call, and an answer has a size."""

from __future__ import annotations

import itertools
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch

from lit_align import EndpointReward
from lit_align.rewards import endpoint
from lit_align.types import Completion, Rollout

ROLLOUT = Rollout([torch.tensor([0])], [{"prompt": "a?"}], [Completion([0], True)], ["a"], 1)
Answer = Callable[[socket.socket], None]


def drips(first: bytes, piece: bytes) -> Answer:
    """Says something, and then a little every few milliseconds, for as long as it is heard."""

    def answer(connection: socket.socket) -> None:
        connection.sendall(first)
        for _ in range(2000):
            time.sleep(0.02)
            connection.sendall(piece)

    return answer


def floods(first: bytes, piece: bytes) -> Answer:
    def answer(connection: socket.socket) -> None:
        connection.sendall(first)
        while True:
            connection.sendall(piece)

    return answer


def answers(body: bytes, status: bytes = b"200 OK") -> Answer:
    def answer(connection: socket.socket) -> None:
        connection.sendall(b"HTTP/1.1 %b\r\nContent-Length: %d\r\n\r\n%b" % (status, len(body), body))

    return answer


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Answer], str]]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    made: list[socket.socket] = []

    def served(answer: Answer) -> str:
        listener = socket.create_server(("127.0.0.1", 0))
        made.append(listener)

        def run() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection:
                    asked = b""
                    while not asked.endswith(b"}"):  # one that is closed with something unread is reset
                        asked += connection.recv(1 << 16) or b"}"
                    try:
                        answer(connection)
                    except OSError:
                        continue

        threading.Thread(target=run, daemon=True).start()
        return f"http://127.0.0.1:{listener.getsockname()[1]}/"

    yield served
    for listener in made:
        listener.close()


OK = b"HTTP/1.1 200 OK\r\n"
DRIPPING = {
    "nothing": drips(b"", b""),
    "the status line": drips(b"HTTP/1.1 200 ", b"O"),
    "a header": drips(OK + b"X-Slow: ", b"a"),
    "empty continuations of a header": drips(OK + b"X-Slow: a", b"\r\n b"),
    "go on, for ever": drips(b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "a body": drips(OK + b"Content-Length: 100000\r\n\r\n", b"1"),
    "a body in chunks": drips(OK + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\n1\r\n"),
    "a body without an end": drips(OK + b"\r\n", b" "),
    "an error": drips(b"HTTP/1.1 400 no\r\nContent-Length: 100000\r\n\r\n", b"1"),
    "a failure": drips(b"HTTP/1.1 500 no\r\nContent-Length: 100000\r\n\r\n", b"1"),
}


@pytest.mark.parametrize("what", DRIPPING)
def test_the_time_is_for_the_whole_call(what: str, serve: Callable[[Answer], str]) -> None:
    before = threading.active_count()
    reward = EndpointReward(serve(DRIPPING[what]), timeout=0.3, retries=0)
    started = time.monotonic()
    with pytest.raises((ConnectionError, ValueError), match="the prompts"):
        reward(ROLLOUT)
    assert time.monotonic() - started < 2
    # What waited for the server ends too: the server's own thread is left.
    for _ in range(100):
        if threading.active_count() <= before + 1:
            break
        time.sleep(0.02)
    assert threading.active_count() <= before + 1


FLOODS = {
    "a body": floods(OK + b"\r\n", b"1" * 65536),
    "chunks": floods(OK + b"Transfer-Encoding: chunked\r\n\r\n", b"10000\r\n" + b"1" * 65536 + b"\r\n"),
}


@pytest.mark.parametrize("what", FLOODS)
def test_an_answer_has_a_size(what: str, serve: Callable[[Answer], str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "LARGEST_ANSWER", 1 << 20)
    reward = EndpointReward(serve(FLOODS[what]), timeout=20, retries=3)
    with pytest.raises(ValueError, match="more than 1,048,576 bytes; the prompts"):
        reward(ROLLOUT)


@pytest.mark.parametrize("what", ["headers", "a header"])
def test_a_flood_of_headers_is_no_answer(what: str, serve: Callable[[Answer], str]) -> None:
    piece = b"".join(b"X-%d: a\r\n" % n for n in range(1000)) if what == "headers" else b"X" * 65536
    reward = EndpointReward(serve(floods(OK, piece)), timeout=20, retries=0)
    with pytest.raises(ConnectionError, match="the prompts"):
        reward(ROLLOUT)


@pytest.mark.parametrize(
    "body",
    [b"[" * 200_000, b'{"scores":' * 100_000, b"[" + b"9" * 5000 + b"]", b"\xff\xfe", b"[NaN]", b"[1e999]", b"null"],
)
def test_an_odd_answer_is_one_line(body: bytes, serve: Callable[[Answer], str]) -> None:
    with pytest.raises(ValueError, match="the prompts") as told:
        EndpointReward(serve(answers(body)), timeout=20, retries=0)(ROLLOUT)
    assert "\n" not in str(told.value)
    assert len(str(told.value)) < 1000


def test_control_bytes_of_a_server_are_escaped(serve: Callable[[Answer], str]) -> None:
    for status in (b"400 \x1b]0;owned\x07", b"503 \x1b[2J", b"307 x\r\nLocation: http://u:pw@host/\x1b[2J"):
        with pytest.raises((ValueError, ConnectionError)) as told:
            EndpointReward(serve(answers(b"\x1b[2J", status)), timeout=20, retries=0)(ROLLOUT)
        assert "\x1b" not in str(told.value)
        assert "\\x1b" in str(told.value)
        assert "pw@" not in str(told.value)


def test_a_slow_answer_within_the_time_is_taken(serve: Callable[[Answer], str]) -> None:
    def slow(connection: socket.socket) -> None:
        for byte in itertools.chain(OK + b"Content-Length: 5\r\n\r\n[2.5]"):
            time.sleep(0.002)
            connection.sendall(bytes([byte]))

    assert EndpointReward(serve(slow), timeout=20, retries=0)(ROLLOUT).tolist() == [2.5]
