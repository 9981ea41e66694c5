"""A server as a reward: what is sent, what may come back, and how long it may take."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lit_align import EndpointReward, Reward
from lit_align.types import Completion, Rollout

Answer = tuple[int, bytes, dict[str, str]]


class Server(ThreadingHTTPServer):
    """Answers each POST as its script says; keeps what it was asked."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.script: Callable[[int, dict[str, Any]], Answer | None] = lambda number, asked: scores(asked)
        self.closing = threading.Event()
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/score"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.asked.append(asked)
            self.server.headers.append(dict(self.headers))
            number = len(self.server.asked)
        answer = self.server.script(number, asked)
        if answer is None:  # hang up
            self.close_connection = True
            return
        status, body, headers = answer
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        raise AssertionError("a POST has become a GET")

    def log_message(self, *args: Any) -> None:
        pass


def answer(value: Any, status: int = 200, **headers: str) -> Answer:
    return status, json.dumps(value).encode(), {name.replace("_", "-"): text for name, text in headers.items()}


def scores(asked: dict[str, Any]) -> Answer:
    return answer({"scores": [float(len(text)) for text in asked["completions"]]})


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Server() as made:
        thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        yield made
        made.closing.set()
        made.shutdown()
        thread.join()


def said(*texts: str) -> Rollout:
    rows: list[dict[str, Any]] = [{"prompt": f"{text}?", "reference": i} for i, text in enumerate(texts)]
    rows[0]["prompt"] = [{"role": "user", "content": rows[0]["prompt"]}]
    return Rollout([torch.tensor([0])] * len(texts), rows, [Completion([0], True)] * len(texts), list(texts), 1)


ANSWERS = said("a", "bb", "ccc", "dddd", "eeeee")


# Kills: order of batches; columns of all rows in each batch; batch_size ignored.
@pytest.mark.parametrize("workers", [1, 3])
def test_completions_are_sent_in_batches_and_scores_come_back_in_order(server: Server, workers: int) -> None:
    def slower_first(number: int, asked: dict[str, Any]) -> Answer:
        time.sleep(0.05 if "a" in asked["completions"] else 0.0)
        return scores(asked)

    server.script = slower_first
    reward = EndpointReward(server.url, columns=["reference"], batch_size=2, workers=workers)
    assert reward(ANSWERS).tolist() == [1.0, 2.0, 3.0, 4.0, 5.0]
    assert sorted(server.asked, key=lambda asked: asked["reference"]) == [
        {"prompts": [[{"role": "user", "content": "a?"}], "bb?"], "completions": ["a", "bb"], "reference": [0, 1]},
        {"prompts": ["ccc?", "dddd?"], "completions": ["ccc", "dddd"], "reference": [2, 3]},
        {"prompts": ["eeeee?"], "completions": ["eeeee"], "reference": [4]},
    ]


def test_a_bare_list_will_do_and_headers_are_sent(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKEN", "secret")
    server.script = lambda number, asked: answer([1, 2, 3, 4, 5])
    reward = EndpointReward(server.url, headers={"Authorization": "Bearer ${TOKEN}"})
    assert reward(ANSWERS).tolist() == [1.0, 2.0, 3.0, 4.0, 5.0]
    assert server.headers[0]["Authorization"] == "Bearer secret"
    assert server.headers[0]["Content-Type"] == "application/json"
    monkeypatch.delenv("TOKEN")
    with pytest.raises(ValueError, match="environment variable TOKEN"):
        reward.load(None)  # type: ignore[arg-type]


PROMPTS = r"; the prompts: 'a\?', 'bb\?', 'ccc\?' and 2 more$"


# Kills: any of the checks dropped; an attempt more where it cannot help.
@pytest.mark.parametrize(
    ("said_by_server", "message"),
    [
        (answer({"scores": [1.0, 2.0]}), r"^the reward at http\S+ returned \(2,\) scores for 5 completions" + PROMPTS),
        (
            answer({"scores": [1.0, float("nan"), 1.0, 1.0, float("inf")]}),
            r"returned nan for 2 of 5 completions; the prompts: 'bb\?', 'eeeee\?'$",
        ),
        (answer([1.0, None, 1.0, 1.0, 1.0]), r"returned \[1.0, None, .*expected a number for each.*" + PROMPTS),
        (answer({"score": [1.0]}), r"answered b'\{\"score\": \[1.0\]\}', which has no `scores`" + PROMPTS),
        ((200, b"<html>", {}), r"answered b'<html>', which is no JSON" + PROMPTS),
        ((200, b"\xff", {}), r"answered b'\\xff', which is no JSON" + PROMPTS),
        ((204, b"", {}), r"answered b'', which is no JSON" + PROMPTS),
        (answer("too long", 422), r"refuses the request with status 422 \(.*\): '\"too long\"'" + PROMPTS),
        (
            answer("", 302, Location="http://127.0.0.1:9/other"),
            r"status 302 \(Found\), which moves it to http://127\.0\.0\.1:9/other: give that as url" + PROMPTS,
        ),
    ],
    ids=["length", "nan", "null", "no scores", "no json", "no utf-8", "nothing", "refused", "moved"],
)
def test_what_a_server_must_not_answer(server: Server, said_by_server: Answer, message: str) -> None:
    server.script = lambda number, asked: said_by_server
    with pytest.raises(ValueError, match=message):
        EndpointReward(server.url, pause=0.0)(ANSWERS)
    assert len(server.asked) == 1


def until(attempt: int, before: Answer | None) -> Callable[[int, dict[str, Any]], Answer | None]:
    return lambda number, asked: before if number < attempt else scores(asked)


# Kills: a status that is not tried again; the connection's end taken for an answer; one attempt too few.
@pytest.mark.parametrize(
    "before",
    [answer("", 500), answer("", 503), answer("", 429), answer("", 408), None],
    ids=["500", "503", "429", "408", "hangs up"],
)
def test_what_passes_is_tried_again(server: Server, before: Answer | None) -> None:
    server.script = until(3, before)
    assert EndpointReward(server.url, retries=2, pause=0.0)(ANSWERS).tolist() == [1.0, 2.0, 3.0, 4.0, 5.0]
    assert len(server.asked) == 3


# Kills: pauses that do not grow; Retry-After ignored.
def test_pauses_grow_and_the_server_may_ask_for_its_own(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)

    monkeypatch.setattr(asyncio, "sleep", sleep)
    server.script = until(4, answer("", 500))
    EndpointReward(server.url, retries=3, pause=0.5)(ANSWERS)
    assert [pause for pause in pauses if pause in (0.5, 1.0, 2.0)] == [0.5, 1.0, 2.0]
    pauses.clear()
    server.asked.clear()
    server.script = until(2, answer("", 429, Retry_After="7"))
    EndpointReward(server.url, retries=1, pause=0.5)(ANSWERS)
    assert 7.0 in pauses
    assert 0.5 not in pauses
    pauses.clear()
    server.asked.clear()
    server.script = until(2, answer("", 429, Retry_After="Wed, 21 Oct 2026 07:28:00 GMT"))
    EndpointReward(server.url, retries=1, pause=0.5)(ANSWERS)
    assert 0.5 in pauses


def test_attempts_come_to_an_end(server: Server) -> None:
    server.script = lambda number, asked: answer("", 500)
    with pytest.raises(ConnectionError, match=r"gave no answer in 3 attempts; the last: status 500 \(.*\)" + PROMPTS):
        EndpointReward(server.url, retries=2, pause=0.0)(ANSWERS)
    assert len(server.asked) == 3
    with pytest.raises(ConnectionError, match=r"gave no answer: status 500"):
        EndpointReward(server.url, retries=0)(ANSWERS)


def test_nobody_there() -> None:
    with Server() as gone:
        url = gone.url
    with pytest.raises(ConnectionError, match=r"gave no answer: .*refused" + PROMPTS):
        EndpointReward(url, retries=0)(ANSWERS)


# Kills: no limit; the limit of a silence alone.
@pytest.mark.parametrize("how", ["silent", "dripping"])
def test_a_slow_answer_is_none(server: Server, how: str) -> None:
    def slow(number: int, asked: dict[str, Any]) -> Answer | None:
        server.closing.wait(3.0)
        return None

    def drip(handler: Handler) -> None:
        handler.rfile.read(int(handler.headers["Content-Length"]))
        handler.send_response(200)
        handler.end_headers()
        for _ in range(60):
            if server.closing.wait(0.05):
                return
            handler.wfile.write(b" ")

    server.script = slow
    if how == "dripping":
        server.RequestHandlerClass = type("Dripping", (Handler,), {"do_POST": drip})  # type: ignore[assignment]
    start = time.monotonic()
    with pytest.raises(ConnectionError, match=r"gave no answer: no answer within 0\.2 s" + PROMPTS):
        EndpointReward(server.url, timeout=0.2, retries=0)(ANSWERS)
    assert time.monotonic() - start < 2.0


# Kills: requests that wait are sent all the same; the ones under way tried again.
def test_the_first_error_ends_all_requests(server: Server) -> None:
    def script(number: int, asked: dict[str, Any]) -> Answer:
        return answer("no", 400) if "a" in asked["completions"] else answer("", 500)

    server.script = script
    many = said("a", *("b" * n for n in range(1, 40)))
    start = time.monotonic()
    with pytest.raises(ValueError, match="status 400"):
        EndpointReward(server.url, batch_size=1, workers=2, retries=9, pause=30.0)(many)
    assert time.monotonic() - start < 5.0
    assert len(server.asked) < 10


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"url": "ftp://x"}, "'ftp://x' is no address: it must begin with http"),
        ({"url": "localhost:8000"}, "is no address"),
        ({"batch_size": 0}, "batch_size and workers must be at least 1"),
        ({"timeout": 0.0}, "timeout above 0"),
        ({"retries": -1}, "retries and pause not negative"),
        ({"columns": ["prompts"]}, "sent in any case"),
        ({"columns": ["answer"]}, "sends the column 'answer'; the row has prompt, reference"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EndpointReward(**{"url": "http://127.0.0.1:9", **options})(ANSWERS)


def test_a_configuration_reaches_it_by_class_path() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--reward", type=Reward)
    options = {"url": "http://x/score", "columns": ["reference"], "headers": {"Authorization": "Bearer ${TOKEN}"}}
    told = {"reward": {"class_path": "lit_align.EndpointReward", "init_args": options}}
    reward = parser.instantiate(parser.parse_object(told)).reward
    assert reward.headers == {"Authorization": "Bearer ${TOKEN}"}


# Kills: the filled-in address in a message, or in the line of a retry; what follows the ? of where it moved.
def test_no_message_shows_a_secret(
    server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("KEY", "s3cret")
    moved = answer("", 302, Location="http://127.0.0.1:9/other?key=s3cret")
    for number, said_by_server in enumerate([answer("", 500), answer([1.0]), answer("no", 400), moved]):
        server.script = lambda _, asked, said_by_server=said_by_server: said_by_server  # type: ignore[misc]
        with caplog.at_level("INFO"), pytest.raises((ValueError, ConnectionError)) as caught:
            EndpointReward(server.url + "?key=${KEY}", retries=1, pause=0.0)(ANSWERS)
        assert "?key=${KEY}" in str(caught.value), number
        assert "s3cret" not in str(caught.value) + caplog.text, number
    assert "attempt 2 of 2" in caplog.text


@pytest.mark.parametrize(
    ("value", "options", "message"),
    [
        ("s3cret", {"url": "http://me:${KEY}@host/score"}, "holds a user or a password: send them in headers"),
        ("s3cret\n", {"url": "http://host/score?key=${KEY}"}, "holds white space once its variables are filled in"),
        ("s3cret\n", {"url": "http://host", "headers": {"X-Key": "${KEY}"}}, "header X-Key has a line's end in it"),
        ("s3cret", {"url": "${KEY}"}, "must begin with http"),
    ],
)
def test_a_secret_that_makes_no_request(
    monkeypatch: pytest.MonkeyPatch, value: str, options: dict[str, Any], message: str
) -> None:
    monkeypatch.setenv("KEY", value)
    with pytest.raises(ValueError, match=message) as caught:
        EndpointReward(**options)(ANSWERS)
    assert "s3cret" not in str(caught.value)


# Kills: the lines of the first process alone.
def test_every_process_says_that_it_tries_again(
    server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for rank, begin in ((0, "the reward at"), (1, "[rank: 1] the reward at")):
        monkeypatch.setattr(rank_zero_only, "rank", rank)
        server.asked.clear()
        server.script = until(2, answer("", 500))
        with caplog.at_level("INFO"):
            EndpointReward(server.url, retries=1, pause=0.0)(ANSWERS)
        assert [record.getMessage().startswith(begin) for record in caplog.records] == [True]
        caplog.clear()
