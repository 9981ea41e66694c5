"""A run in a process of its own, forked from one that has imported everything, and watched."""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cases
import torch

import lit_align.cli.lightning_cli
from lit_align.__main__ import entry

torch.set_num_threads(1)
# The parser of one command is built in a quarter of the time.
COMMANDS = {"fit": lit_align.cli.lightning_cli.AlignCLI.subcommands()["fit"]}
lit_align.cli.lightning_cli.AlignCLI.subcommands = staticmethod(lambda: COMMANDS)

LIMIT = 300.0  # seconds, for an attempt: longer is a hang


def child(work: Callable[[], int], log: Path) -> int:
    """Fork, and do the work there; returns the process."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        with log.open("ab") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        code = work()
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else 0
    except BaseException:  # what a user would see as a traceback
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def waited(pid: int, seconds: float = LIMIT) -> int | None:
    """Exit status, negative for a signal; None if it is still running after so many seconds."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    return None


def fit(file: Path, cache: Path, *more: str, hook: Callable[[], None] | None = None) -> Callable[[], int]:
    """`lit-align fit` on a file, as the console runs it."""

    def work() -> int:
        os.environ["LIT_ALIGN_CACHE"] = str(cache)
        sys.argv = ["lit-align", "fit", "-c", str(file), *more]
        if hook is not None:
            hook()
        return entry()

    return work


CHANGES = ("open", "os.rename", "os.remove", "os.symlink", "os.mkdir", "os.rmdir", "shutil.rmtree")


def file_operations(folders: list[Path], act: Callable[[int, str], None]) -> Callable[[], None]:
    """Call `act` before every operation that changes a file under the folders, with its number and name."""
    count = 0
    roots = tuple(map(str, folders))

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if event not in CHANGES or not arguments or not str(arguments[0]).startswith(roots):
            return
        if event == "open" and (not isinstance(arguments[1], str) or not set(arguments[1]) & set("wax+")):
            return
        count += 1
        act(count, f"{event} {Path(str(arguments[0])).name}")

    return lambda: sys.addaudithook(audit)


@dataclass
class Whole:
    """A run that was left alone.

    Attributes:
        out: its folder.
        seconds: how long it took.
        operations: how often it changed a file.
    """

    out: Path
    seconds: float
    operations: int


def left_alone(place: Path, method: str, way: str) -> Whole:
    """The run that others are compared with."""
    out = place / "whole" / f"{method}-{list(cases.WAYS).index(way)}"
    out.parent.mkdir(exist_ok=True)
    file, cache, counted = cases.write(place, method, way, out), out.with_suffix(".cache"), out.with_suffix(".count")
    hook = file_operations([out, cache], lambda number, name: os.write(counts, f"{number} {name}\n".encode()) and None)
    counts = os.open(counted, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    started = time.monotonic()
    code = waited(child(fit(file, cache, hook=hook), out.with_suffix(".log")))
    os.close(counts)
    if code != 0:
        raise SystemExit(
            f"{method}, {way}: the run left alone ended with {code}:\n{out.with_suffix('.log').read_text()}"
        )
    return Whole(out, time.monotonic() - started, len(counted.read_text().splitlines()))
