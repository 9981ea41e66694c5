"""A stand-in for the server of Weights & Biases: what `wandb sweep`, `wandb agent` and a run ask of it, and no more."""

from __future__ import annotations

import contextlib
import gzip
import json
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

ENTITY, PROJECT, SWEEP = "somebody", "lit_align", "sweep1"


@dataclass
class Run:
    """What a run reported.

    Attributes:
        exits: codes it ended with; none while it runs, and none of a process that was killed.
        history: rows of metrics.
        sweep: the sweep it says it belongs to.
    """

    exits: list[int] = field(default_factory=list)
    history: list[dict[str, Any]] = field(default_factory=list)
    sweep: str | None = None


@dataclass
class Server:
    """Its memory.

    Attributes:
        url: where it listens.
        work: the commands that the agent is given, one each time it has no run.
        config: of the sweep, as YAML text.
        runs: by id.
        asked: names of the operations, in order.
    """

    work: list[dict[str, Any]]
    url: str = ""
    config: str = ""
    runs: dict[str, Run] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def answer(self, name: str, variables: dict[str, Any]) -> dict[str, Any]:
        """The data of a GraphQL operation."""
        with self.lock:
            self.asked.append(name)
            known: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
                "Viewer": self._viewer,
                "UpsertSweep": self._upsert_sweep,
                "SweepWithRuns": lambda _: {"project": {"sweep": {"config": self.config, "runs": {"edges": []}}}},
                "CreateAgent": lambda _: {"createAgent": {"agent": {"id": "agent1"}}},
                "Heartbeat": self._heartbeat,
                "UpsertBucket": self._upsert_run,
                "ServerFeaturesQuery": lambda _: {"serverInfo": {"features": []}},
                "CreateRunFiles": lambda _: {"createRunFiles": {"runID": "x", "uploadHeaders": [], "files": []}},
                "OrganizationCoreWeaveOrganizationID": lambda _: {
                    "entity": {"organization": {"coreWeaveOrganizationId": None}}
                },
            }
            return known[name](variables)

    def _viewer(self, _: dict[str, Any]) -> dict[str, Any]:
        return {"viewer": {"id": "1", "entity": ENTITY, "username": ENTITY, "teams": {"edges": []}}}

    def _upsert_sweep(self, variables: dict[str, Any]) -> dict[str, Any]:
        self.config = variables["config"]
        project = {"name": PROJECT, "entity": {"name": ENTITY}}
        return {"upsertSweep": {"sweep": {"name": SWEEP, "project": project}, "configValidationWarnings": []}}

    def _heartbeat(self, variables: dict[str, Any]) -> dict[str, Any]:
        # Only runs that are alive are named.
        commands = []
        if not json.loads(variables["runState"]):
            commands = [self.work.pop(0) if self.work else {"type": "exit"}]
        return {"agentHeartbeat": {"agent": {"id": "agent1"}, "commands": json.dumps(commands)}}

    def _upsert_run(self, variables: dict[str, Any]) -> dict[str, Any]:
        name = variables["name"]
        run = self.runs.setdefault(name, Run())
        run.sweep = variables.get("sweep") or run.sweep
        project = {"name": PROJECT, "entity": {"name": ENTITY}}
        bucket = {"id": name, "name": name, "displayName": name, "sweepName": run.sweep, "project": project}
        return {"upsertBucket": {"inserted": True, "bucket": bucket}}

    def stream(self, name: str, told: dict[str, Any]) -> None:
        """What a run sends on its way."""
        with self.lock:
            run = self.runs[name]
            lines = (told.get("files") or {}).get("wandb-history.jsonl", {}).get("content", [])
            run.history += [json.loads(line) for line in lines]
            if told.get("complete"):
                run.exits.append(told["exitcode"])


@contextlib.contextmanager
def serve(work: list[dict[str, Any]]) -> Iterator[Server]:
    """A server on a free port of this machine, until the end of the block."""
    server = Server(work)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            if stream := re.fullmatch(r"/files/[^/]+/[^/]+/([^/]+)/file_stream", self.path):
                server.stream(stream[1], json.loads(body))
                answer: dict[str, Any] = {}
            elif self.path == "/graphql":
                told = json.loads(body)
                operation = re.search(r"(?:query|mutation)\s+(\w+)", told["query"])
                assert operation
                answer = {"data": server.answer(operation[1], told.get("variables") or {})}
            else:
                answer = {}
            text = json.dumps(answer).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *_: Any) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    server.url = f"http://127.0.0.1:{http.server_address[1]}"
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()
        thread.join()
