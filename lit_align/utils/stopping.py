"""Signals that ask a process to stop: SIGINT (Ctrl-C) and SIGTERM, from the first moment of a command to its last.

A run in training ends where a checkpoint is exact (`callbacks/preemption.py`). At every other moment a signal ends the
command at once. The exit status is 128 + the signal's number, as a shell's: 130 for Ctrl-C, 143 for SIGTERM.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


class Stopped(SystemExit):
    """A signal ended the command.

    Args:
        number: of the signal.
        kept: what is kept and how to go on; callers that know it set it later.

    Attributes:
        asked: whether somebody asked for this exit; one by `sys.exit` in a user's code has no such attribute.
    """

    asked = True

    def __init__(self, number: int, kept: str = "") -> None:
        super().__init__(128 + number)
        self.number, self.kept = number, kept

    def __str__(self) -> str:
        name = "Ctrl-C" if self.number == signal.SIGINT else signal.Signals(self.number).name
        return f"stopped by {name}" + (f": {self.kept}" if self.kept else "")


def handler(act: Callable[[int], None]) -> Callable[[int, Any], None]:
    """A signal handler for this process alone.

    A forked child, which builds batches, inherits it. The terminal sends Ctrl-C to the child too, which must go on
    until its parent stops it; a SIGTERM to the child ends it, as by default.
    """
    owner = os.getpid()

    def handle(number: int, frame: Any) -> None:
        if os.getpid() == owner:
            act(number)
        elif number != signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    return handle


def listen(act: Callable[[int], None], numbers: set[int]) -> dict[int, Any]:
    """Call `act` for these signals; a Ctrl-C that is ignored, as in a background job, stays ignored.

    Returns:
        The handlers from before, for `restore`. None in a thread, where Python sets no handlers.
    """
    if threading.current_thread() is not threading.main_thread():
        return {}
    numbers = {n for n in numbers if not (n == signal.SIGINT and signal.getsignal(n) == signal.SIG_IGN)}
    return {number: signal.signal(number, handler(act)) for number in numbers}


def restore(handlers: dict[int, Any]) -> None:
    """Set handlers that `listen` returned."""
    for number, before in handlers.items():
        signal.signal(number, signal.SIG_DFL if before is None else before)
    handlers.clear()


def _at_once(number: int) -> None:
    raise Stopped(number)


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """Within, both signals raise `Stopped`."""
    before = listen(_at_once, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        restore(before)


@contextlib.contextmanager
def no_silent_exit(run: Path | None = None) -> Iterator[None]:
    """Within, the process ends with exit status 0 for no other reason than being done.

    Args:
        run: folder of the run, to say what can be taken up.

    Raises:
        ValueError: a user's code called `sys.exit`.
        Stopped: a signal came; says how to go on.
    """
    try:
        yield
    except SystemExit as error:
        if isinstance(error, Stopped):
            error.kept = error.kept or _kept(run)
        if getattr(error, "asked", False):
            raise
        from lightning.pytorch.utilities.exceptions import SIGTERMException  # takes a second to import

        if isinstance(error, SIGTERMException):
            raise Stopped(signal.SIGTERM, _kept(run)) from error
        if isinstance(error.__context__, KeyboardInterrupt):  # Lightning turns it into an exit with 1
            raise Stopped(signal.SIGINT, _kept(run)) from error
        raise ValueError(
            f"code that the run called (a reward, a data source, a callback) called sys.exit({error.code!r}): raise an "
            "error there instead"
        ) from error
    except KeyboardInterrupt as error:
        raise Stopped(signal.SIGINT, _kept(run)) from error


def _kept(run: Path | None) -> str:
    if run is None:
        return ""
    last = run / "checkpoints" / "last.ckpt"
    if last.exists():
        return f"what came after {last} is lost; go on with --ckpt_path last"
    return "nothing was saved yet"
