"""An annotation for tests: a folder of tasks, a desk, an application, and the server as a process of its own."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).parents[2]


def task_rows(count: int, k: int = 2) -> list[dict[str, Any]]:
    return [{"prompt": f"Prompt {i}", "completions": [f"answer {j} of {i}" for j in range(k)]} for i in range(count)]


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def label_for(task: dict[str, Any], version: str, **told: Any) -> dict[str, Any]:
    """What the page posts of a task: the first completion is the best."""
    k = len(task["completions"])
    posted = {"id": uuid.uuid4().hex, "task": task["id"], "kind": "label", "ranks": list(range(k)), "seconds": 1.5}
    return {**posted, **({"strength": 1} if k == 2 else {}), "guideline": version, **told}


class Client:
    """Posts and gets JSON with a token.

    Args:
        base: address of the server.
        token: of an annotator.
    """

    def __init__(self, base: str, token: str) -> None:
        self.base, self.token = base, token

    def ask(self, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
        """Status and JSON; raises OSError where there is no answer."""
        data = None if body is None else json.dumps(body).encode()
        told = {"Authorization": f"Bearer {self.token}", "Content-Type": "application/json", **headers}
        request = urllib.request.Request(self.base + path, data, told)
        try:
            with urllib.request.urlopen(request, timeout=30) as response:
                return response.status, json.loads(response.read())
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.loads(error.read() or b"{}")


class Server:
    """`lit-align annotate` in a process of its own.

    Args:
        file: tasks.
        out: folder of the annotation.
        options: further arguments.
    """

    def __init__(self, file: Path, out: Path, *options: str) -> None:
        self.out, self.args = out, [str(file), "--out", str(out), "--port", "0", *options]
        self.process: subprocess.Popen[str] | None = None
        self.base = ""
        self.log: list[str] = []

    def start(self) -> None:
        environment = {**os.environ, "PYTHONPATH": str(PACKAGE), "PYTHONUNBUFFERED": "1"}
        command = [sys.executable, "-m", "lit_align", "annotate", *self.args]
        self.process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.log.append(line)
            if line.startswith("listening on "):
                self.base = line.removeprefix("listening on ").partition(";")[0].strip()
                break
        else:
            raise AssertionError("".join(self.log))
        for _ in range(200):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{self.base}/static/icon.svg", timeout=5).close()
                return
            time.sleep(0.05)
        raise AssertionError("the server does not answer")

    def stop(self, number: int = signal.SIGTERM) -> str:
        """Signal and wait; everything that it printed."""
        assert self.process is not None
        self.process.send_signal(number)
        rest, _ = self.process.communicate(timeout=30)
        self.log.append(rest)
        return "".join(self.log)

    def links(self) -> dict[str, str]:
        """Tokens by name."""
        lines = (self.out / "links.tsv").read_text().splitlines()
        return {line.split("\t")[0]: line.partition("#")[2] for line in lines}

    def client(self, name: str) -> Client:
        return Client(self.base, self.links()[name])


@contextlib.contextmanager
def running(file: Path, out: Path, *options: str) -> Iterator[Server]:
    server = Server(file, out, *options)
    server.start()
    try:
        yield server
    finally:
        if server.process is not None and server.process.poll() is None:
            server.stop()
