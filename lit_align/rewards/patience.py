"""Calls that may hang or fail for a while: a limit of time, and further attempts after growing pauses."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

from lightning.pytorch.utilities.rank_zero import rank_prefixed_message, rank_zero_only

T = TypeVar("T")
LONGEST_PAUSE = 60.0
_LOG = logging.getLogger("lightning.pytorch.utilities.rank_zero")  # where the other lines of a run go


class TryAgain(Exception):
    """What may be gone the next time.

    Args:
        reason: what it was.
        after: seconds that it asks to wait for.
    """

    def __init__(self, reason: str, after: float | None = None) -> None:
        super().__init__(reason)
        self.after = after


class Attempts:
    """Counts attempts at one call, and says how long to wait before the next.

    Args:
        what: how messages name the call.
        retries: further attempts.
        pause: seconds before the first of them; doubled each time, up to a minute.
    """

    def __init__(self, what: str, retries: int, pause: float) -> None:
        self.what, self.retries, self.pause = what, retries, pause
        self.failed = 0

    def wait_after(self, problem: TryAgain) -> float:
        """Count a failed attempt, and log that another one comes; returns seconds to wait before it.

        Raises:
            TryAgain: all attempts are spent; names their number.
        """
        self.failed += 1
        if self.failed > self.retries:
            tried = f" in {self.failed} attempts; the last" if self.failed > 1 else ""
            raise TryAgain(f"{self.what} gave no answer{tried}: {problem}") from problem
        wait = self.pause * 2 ** (self.failed - 1) if problem.after is None else problem.after
        wait = min(wait, LONGEST_PAUSE)
        said = f"{self.what}: {problem}; attempt {self.failed + 1} of {self.retries + 1} in {wait:g} s"
        # Of every process: each asks for answers of its own, and all wait for the slowest.
        _LOG.info(rank_prefixed_message(said, getattr(rank_zero_only, "rank", 0) or None))
        return wait


def patiently(call: Callable[[], T], attempts: Attempts) -> T:
    """Call, and call again where it raises `TryAgain`.

    Raises:
        TryAgain: see `Attempts.wait_after`.
    """
    while True:
        try:
            return call()
        except TryAgain as problem:
            time.sleep(attempts.wait_after(problem))


def within(seconds: float | None, call: Callable[[], T]) -> T:
    """Call, for so long and no longer; null for no limit.

    Nothing can stop a thread of Python: one that hangs is left behind, as one that does not keep the process alive.

    Raises:
        TimeoutError: it has not come back.
    """
    if seconds is None:
        return call()
    returned: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()

    def run() -> None:
        try:
            returned.put((call(), None))
        except BaseException as error:
            returned.put((None, error))

    threading.Thread(target=run, daemon=True).start()
    try:
        value, error = returned.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"no answer within {seconds:g} s") from None
    if error is not None:
        raise error
    return value
