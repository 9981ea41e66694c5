"""Handle SIGINT (Ctrl-C) and SIGTERM during the whole life of a command.

During training, a run stops where a checkpoint is exact (`callbacks/preemption.py`). At any other time a signal ends
the command at once. The exit status is 128 + the number of the signal, as in a shell: 130 for Ctrl-C, 143 for SIGTERM.
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
        number: number of the signal.
        kept: what was saved and how to continue; callers may set it later.

    Attributes:
        asked: marks a requested exit; a `sys.exit` in a user's code has no such attribute.
    """

    asked = True

    def __init__(self, number: int, kept: str = "") -> None:
        super().__init__(128 + number)
        self.number, self.kept = number, kept

    def __str__(self) -> str:
        name = "Ctrl-C" if self.number == signal.SIGINT else signal.Signals(self.number).name
        return f"stopped by {name}" + (f": {self.kept}" if self.kept else "")


def handler(act: Callable[[int], None]) -> Callable[[int, Any], None]:
    """Make a signal handler that acts in this process only.

    Forked data-loader workers inherit the handler. The terminal sends Ctrl-C to them too, and they must go on until the
    parent stops them. A SIGTERM ends a worker, as by default.
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
    """Call `act` for these signals. If Ctrl-C is ignored, as in a background job, it stays ignored.

    Returns:
        The previous handlers, for `restore`; empty in a thread, because Python sets handlers in the main thread only.
    """
    if threading.current_thread() is not threading.main_thread():
        return {}
    numbers = {n for n in numbers if not (n == signal.SIGINT and signal.getsignal(n) == signal.SIG_IGN)}
    return {number: signal.signal(number, handler(act)) for number in numbers}


def restore(handlers: dict[int, Any]) -> None:
    """Restore the handlers that `listen` returned."""
    for number, before in handlers.items():
        signal.signal(number, signal.SIG_DFL if before is None else before)
    handlers.clear()


def _at_once(number: int) -> None:
    raise Stopped(number)


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """Raise `Stopped` on either signal inside the block."""
    before = listen(_at_once, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        restore(before)


@contextlib.contextmanager
def no_silent_exit(run: Path | None = None) -> Iterator[None]:
    """Make sure that exit status 0 means that the work inside the block is done.

    Args:
        run: folder of the run, to say what can be resumed.

    Raises:
        ValueError: a user's code called `sys.exit`.
        Stopped: a signal arrived; says how to continue.
    """
    try:
        yield
    except SystemExit as error:
        if isinstance(error, Stopped):
            error.kept = error.kept or _kept(run)
        if getattr(error, "asked", False):
            raise
        from lightning.pytorch.utilities.exceptions import SIGTERMException  # slow to import

        if isinstance(error, SIGTERMException):
            raise Stopped(signal.SIGTERM, _kept(run)) from error
        if isinstance(error.__context__, KeyboardInterrupt):  # Lightning turned it into exit status 1
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
        return f"work after {last} is lost; continue with --ckpt_path last"
    return "nothing was saved yet"
