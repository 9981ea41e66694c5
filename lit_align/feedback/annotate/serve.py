"""Start the page: files into a database, links for people, and a server that stops when it is told to."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lit_align.feedback.annotate.desk import Desk, Rules
from lit_align.feedback.annotate.guard import ADMINISTRATOR, LOOPBACK, Tokens, key_in
from lit_align.feedback.annotate.guideline import read_guideline
from lit_align.feedback.annotate.tables import connect, has_tasks, sqlite_url
from lit_align.feedback.labels import write_rows
from lit_align.feedback.tasks import Task, build_controls, build_tasks
from lit_align.utils.display import say
from lit_align.utils.secret import write_private


@dataclass(frozen=True)
class Place:
    """Where an annotation lies, and where it is served.

    Attributes:
        files: of completions; see `build_tasks`.
        out: folder of the database, the key and the links.
        database: URL of SQLAlchemy; null for a SQLite file in `out`.
        host: address to listen on.
        port: 0 for a free one.
        hosts: further names under which the page is reached, as through a proxy.
    """

    files: Sequence[str]
    out: Path
    database: str | None = None
    host: str = "127.0.0.1"
    port: int = 8899
    hosts: Sequence[str] = ()


def open_desk(place: Place, rules: Rules, guideline: str | None, controls: str | None) -> Desk:
    """The desk of an annotation: the files' tasks are added to those that its database has.

    Raises:
        ValueError: a file, a control, the guideline or the database cannot be used; names it.
    """
    place.out.mkdir(parents=True, exist_ok=True)
    asked = read_guideline(guideline)
    given = [*map(str, place.files), *([controls] if controls else [])]
    url = place.database or sqlite_url(place.out / "labels.db")
    stamp: list[Any] = [
        [path, os.stat(path).st_size, os.stat(path).st_mtime_ns] for path in given if Path(path).exists()
    ]
    stamp.append(hashlib.sha256(url.encode()).hexdigest())
    mark, engine = place.out / "files.json", connect(url)
    # Reading files takes seconds: it needs the data modules. A restart finds their tasks in the database.
    known = mark.exists() and json.loads(mark.read_text()) == stamp and has_tasks(engine)
    desk = Desk(engine, rules, asked, [] if known else _tasks(place.files, controls))
    mark.write_text(json.dumps(stamp))
    return desk


def _tasks(files: Sequence[str], controls: str | None) -> list[Task]:
    tasks, counts = build_tasks(files) if files else ([], {})
    if counts:
        say(", ".join(f"{count:,} {what.replace('_', ' ')}" for what, count in counts.items()))
    return tasks + (build_controls(controls) if controls else [])


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold the folder: two servers of one annotation would hand out the same tasks twice.

    Raises:
        ValueError: another process holds it.
    """
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ValueError(f"{folder}: another lit-align annotate serves it: stop that one first") from error
        yield


def serve(place: Place, desk: Desk, rate: float = 10.0) -> None:
    """Serve until the process is told to stop.

    Raises:
        ValueError: the address cannot be listened on, or is every address and nobody says under which name.
    """
    import socket

    import uvicorn

    from lit_align.feedback.annotate.server import application

    names = [*place.hosts, *LOOPBACK, place.host.strip("[]")]
    if place.host in ("0.0.0.0", "::") and not place.hosts:
        raise ValueError(
            f"--host {place.host} listens on every address: add --allow-host NAME, the name in annotators' links"
        )
    family = socket.AF_INET6 if ":" in place.host else socket.AF_INET
    try:
        listening = socket.create_server((place.host, place.port), family=family, backlog=256)
    except OSError as error:
        way_out = "choose another --port" if place.port else "choose another --host"
        raise ValueError(
            f"{place.host}:{place.port} cannot be listened on: {error.strerror or error}; {way_out}"
        ) from error
    port = listening.getsockname()[1]
    tokens = Tokens(key_in(place.out / "key"), desk.rules.annotators)
    _say_links(place, port, tokens, desk)
    if place.host not in LOOPBACK:
        say(
            f"warning: {place.host} can be reached from other machines, and what travels there is not encrypted: "
            "anyone on the way can read tokens and labels. Better: stay on 127.0.0.1 behind an SSH tunnel or TLS."
        )
    config = uvicorn.Config(
        application(desk, tokens, names, rate),
        access_log=False,  # nothing of a request reaches a log
        log_level="warning",
        limit_concurrency=500,
        timeout_keep_alive=20,
        timeout_graceful_shutdown=5,
        server_header=False,
    )
    with listening:
        uvicorn.Server(config).run(sockets=[listening])


def _say_links(place: Place, port: int, tokens: Tokens, desk: Desk) -> None:
    """Write the private links to a file that its owner alone can read; the terminal shows where."""
    host = place.hosts[0] if place.hosts else place.host
    base = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    people = [f"{name}\t{base}/#{tokens[name]}" for name in desk.rules.annotators]
    text = "\n".join([*people, f"administrator\t{base}/admin#{tokens[ADMINISTRATOR]}"]) + "\n"
    write_private(place.out / "links.tsv", text)
    told = desk.overview()
    say(
        f"{told['tasks']:,} tasks, {told['controls']:,} controls, {told['labels']:,} of {told['wanted']:,} labels\n"
        f"private links of {len(people)} annotators and of the administrator: {place.out / 'links.tsv'}\n"
        f"listening on {base}; Ctrl-C stops"
    )


def export(desk: Desk, path: Path, pairs: bool = False, screened: bool = False) -> dict[str, Any]:
    """Write the labels that count; return how many, and whose were left out.

    Args:
        desk: of the annotation.
        path: .jsonl or .parquet.
        pairs: prompt, chosen and rejected, as TRL loads them, instead of label rows.
        screened: with labels of annotators below the pass mark.

    Raises:
        ValueError: there are no labels, or the file has another ending.
    """
    from lit_align.feedback.labels import pairs_of

    labels = desk.labels(screened)
    out = [] if screened else [a["annotator"] for a in desk.overview()["annotators"] if a["screened"]]
    if not labels:
        raise ValueError("there are no labels to export" + (f" but those of {', '.join(out)}" if out else ""))
    count = write_rows(path, pairs_of(labels) if pairs else (label.row() for label in labels))
    return {"rows": count, "left_out": out}
