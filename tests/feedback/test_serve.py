"""`lit-align annotate` as a process: many at once, killed at random, over SQLite and PostgreSQL."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import socket
import stat
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from support.annotation import Client, Server, label_for, running, task_rows, write_rows

from lit_align.cli import main
from lit_align.config.errors import ConfigError
from lit_align.feedback.labels import read_labels

for name in ("sqlalchemy", "starlette", "uvicorn"):
    pytest.importorskip(name, reason="the page's dependencies are an extra: pip install 'lit_align[annotate]'")


def label_all(client: Client, at_most: int = 10**9, acknowledged: list[str] | None = None) -> int:
    """Label task after task until there is none; the number of labels stored."""
    status, session = client.ask("/api/session")
    assert status == 200, session
    task, done = session["task"], 0
    while task is not None and done < at_most:
        posted = label_for(task, session["version"])
        status, answer = client.ask("/api/labels", posted)
        assert status == 200, answer
        if acknowledged is not None:
            acknowledged.append(posted["id"])
        task, done = answer["task"], done + 1
    return done


def stored(out: Path, url: str | None = None) -> list[tuple[str, str, str]]:
    """Id, task and annotator of each label that counts."""
    import sqlalchemy as sa

    from lit_align.feedback.annotate.tables import LABELS, connect, sqlite_url

    columns = (LABELS.c.id, LABELS.c.task, LABELS.c.annotator)
    engine = connect(url or sqlite_url(out / "labels.db"))
    with engine.connect() as connection:
        rows = connection.execute(sa.select(*columns).where(LABELS.c.withdrawn == sa.false())).all()
    engine.dispose()
    return [tuple(row) for row in rows]


def twenty_at_once(folder: Path, tasks: int, *options: str, url: str | None = None) -> float:
    """Twenty clients label as quickly as they can; labels a second."""
    file = write_rows(folder / "tasks.jsonl", task_rows(tasks))
    more = ("--annotators", "20", "--per-task", "20", "--rate", "100000", *options)
    with running(file, folder / "out", *more) as server, ThreadPoolExecutor(20) as pool:
        acknowledged: list[list[str]] = [[] for _ in range(20)]
        clients = [server.client(f"annotator-{n}") for n in range(1, 21)]
        began = time.monotonic()
        done = list(pool.map(lambda c, mine: label_all(c, acknowledged=mine), clients, acknowledged))
        seconds = time.monotonic() - began
        assert done == [tasks] * 20
        log = server.stop()
    rows = stored(folder / "out", url)
    assert len(rows) == len({row[1:] for row in rows}) == 20 * tasks
    assert {row[0] for row in rows} == {one for mine in acknowledged for one in mine}
    for token in server.links().values():
        assert token not in log
    return 20 * tasks / seconds


@pytest.mark.slow
def test_a_thousand_labels_of_twenty_clients_at_once_are_all_there_once(tmp_path: Path) -> None:
    print(f"{twenty_at_once(tmp_path, 50):.0f} labels a second")


def kill_at_random(folder: Path, times: int, *options: str, url: str | None = None) -> int:
    """Four clients label without pause; the server is killed again and again. Labels acknowledged in the end."""
    file = write_rows(folder / "tasks.jsonl", task_rows(1500))
    server = Server(file, folder / "out", "--annotators", "4", "--per-task", "4", "--rate", "100000", *options)
    server.start()
    port, tokens, rng = server.base.rpartition(":")[2], server.links(), random.Random(0)
    server.args[server.args.index("--port") + 1] = port  # where the pages look for it
    base, over = server.base, threading.Event()
    acknowledged: list[str] = []

    def annotate(name: str) -> None:
        client, session, posted = Client(base, tokens[name]), None, None
        while not over.is_set():
            try:
                if session is None:
                    session = client.ask("/api/session")[1]
                    task = session["task"] if posted is None else None
                if posted is None:
                    posted = label_for(task, session["version"])
                status, answer = client.ask("/api/labels", posted)  # the same again after a lost answer
                assert status == 200, answer
                acknowledged.append(posted["id"])
                posted, task = None, answer["task"]
            except OSError:
                time.sleep(0.02)

    with ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(annotate, name) for name in tokens if name != "administrator"]
        try:
            for _ in range(times):
                time.sleep(rng.uniform(0.05, 0.5))
                server.stop(signal.SIGKILL)
                server.start()
            time.sleep(0.3)
        finally:
            over.set()
        for future in futures:
            future.result()
    server.stop()
    rows = stored(folder / "out", url)
    assert len(rows) == len({row[1:] for row in rows})
    assert len(acknowledged) == len(set(acknowledged))
    assert set(acknowledged) <= {row[0] for row in rows}
    assert len(rows) - len(acknowledged) <= 4  # those whose answer the last stop swallowed
    return len(acknowledged)


@pytest.mark.slow
def test_a_server_that_is_killed_at_twenty_moments_loses_no_acknowledged_label(tmp_path: Path) -> None:
    assert kill_at_random(tmp_path, 20) > 100


@contextlib.contextmanager
def postgresql(folder: Path) -> Iterator[str]:
    """A PostgreSQL server of its own; its URL."""
    pytest.importorskip("pg8000", reason="the driver of PostgreSQL that the tests use: pip install pg8000")
    found = [
        *Path("/usr/lib/postgresql").glob("*/bin/initdb"),
        *([shutil.which("initdb")] if shutil.which("initdb") else []),
    ]
    if not found:
        pytest.skip("PostgreSQL is not installed")
    programs, data = Path(str(found[0])).parent, folder / "postgresql"
    data.mkdir()
    as_other: list[str] = []
    if os.getuid() == 0:  # PostgreSQL refuses to run as root
        if shutil.which("runuser") is None:
            pytest.skip("PostgreSQL does not run as root, and runuser is missing")
        shutil.chown(data, "nobody")
        for parent in [data, *data.parents]:
            if parent != Path("/") and not os.stat(parent).st_mode & stat.S_IXOTH:
                parent.chmod(parent.stat().st_mode | stat.S_IXOTH)
        as_other = ["runuser", "-u", "nobody", "--"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    quiet: Any = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": data}
    made = [*as_other, str(programs / "initdb"), "-D", str(data / "db"), "-U", "tester", "--auth=trust", "-E", "UTF8"]
    subprocess.run(made, check=True, **quiet)
    command = [*as_other, str(programs / "postgres"), "-D", str(data / "db"), "-p", str(port), "-k", str(data)]
    process = subprocess.Popen([*command, "-c", "listen_addresses=127.0.0.1"], **quiet)
    try:
        for _ in range(200):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            time.sleep(0.1)
        time.sleep(1)
        yield f"postgresql+pg8000://tester@127.0.0.1:{port}/postgres"
    finally:
        process.terminate()
        process.wait(20)


@pytest.mark.slow
def test_postgresql_keeps_what_twenty_clients_say(tmp_path: Path) -> None:
    with postgresql(tmp_path) as url:
        print(f"{twenty_at_once(tmp_path, 50, '--database', url, url=url):.0f} labels a second")


@pytest.mark.slow
def test_postgresql_loses_no_acknowledged_label_of_a_killed_server(tmp_path: Path) -> None:
    with postgresql(tmp_path) as url:
        assert kill_at_random(tmp_path, 20, "--database", url, url=url) > 100


@pytest.mark.slow
def test_the_command_serves_locks_its_folder_and_exports(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "tasks.jsonl", task_rows(3, 3))
    out = tmp_path / "tasks.annotation"
    with running(file, out, "--annotators", "ada,bob") as server:
        assert server.base.startswith("http://127.0.0.1:")
        for path in ("links.tsv", "key"):
            assert stat.S_IMODE((out / path).stat().st_mode) == 0o600
        assert label_all(server.client("ada")) == label_all(server.client("bob")) == 3
        with pytest.raises(ValueError, match="another lit-align annotate serves it"):
            main(["annotate", str(file), "--out", str(out), "--annotators", "ada,bob"])
        log = server.stop()
    assert not [token for token in server.links().values() if token in log]
    main(["annotate", "--out", str(out), "--annotators", "ada,bob", "--export", str(tmp_path / "labels.parquet")])
    assert len(read_labels(tmp_path / "labels.parquet")) == 6
    main(["annotate", str(file), "--annotators", "ada,bob", "--export", str(tmp_path / "pairs.jsonl"), "--pairs"])
    assert len((tmp_path / "pairs.jsonl").read_text().splitlines()) == 18


def test_arguments_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "tasks.jsonl", task_rows(2))
    with pytest.raises(ConfigError, match="name a FILE of completions"):
        main(["annotate"])
    with pytest.raises(ConfigError, match="--rate must be above 0"):
        main(["annotate", str(file), "--rate", "0"])
    with pytest.raises(ConfigError, match="is no name"):
        main(["annotate", str(file), "--annotators", "ada,,bob"])
    with pytest.raises(ValueError, match="per_task must be from 1"):
        main(["annotate", str(file), "--annotators", "ada", "--per-task", "2"])
    with pytest.raises(ValueError, match="no labels to export"):
        main(["annotate", str(file), "--export", str(tmp_path / "labels.jsonl")])
    with pytest.raises(ValueError, match=r"--host 0\.0\.0\.0 listens on every address: add --allow-host"):
        main(["annotate", str(file), "--host", "0.0.0.0"])
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(ValueError, match="cannot be listened on"):
        main(["annotate", str(file), "--port", str(taken.getsockname()[1])])
