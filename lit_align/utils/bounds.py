"""Bounds on work that a file of somebody else's decides, as a chat template does."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

SECONDS = 10.0
MEMORY = 4 << 30  # bytes


@contextlib.contextmanager
def at_most(seconds: float = SECONDS, memory: int = MEMORY) -> Iterator[None]:
    """Bound time and memory of what Python does within.

    Time is bounded in the main thread only, which signals reach, and only if no other timer runs. Memory is bounded on
    Linux; the bound holds for all threads in the meantime.

    Args:
        seconds: of the clock.
        memory: bytes beyond what the process has.

    Raises:
        TimeoutError: more time is needed.
        MemoryError: more memory is needed.
    """
    with _time(seconds), _memory(memory):
        yield


@contextlib.contextmanager
def _time(seconds: float) -> Iterator[None]:
    main = threading.current_thread() is threading.main_thread()
    if not main or not hasattr(signal, "setitimer") or signal.getitimer(signal.ITIMER_REAL)[0]:
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"not done within {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def _memory(more: int) -> Iterator[None]:
    held = _held()
    if held is None:
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    bound = held + more
    if any(limit != resource.RLIM_INFINITY and limit < bound for limit in (soft, hard)):
        yield  # bounded already
        return
    resource.setrlimit(resource.RLIMIT_DATA, (bound, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def _held() -> int | None:
    """Bytes of private memory that this process has, in the kernel's count; None where that is not known."""
    if resource is None:
        return None
    try:
        return int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
    except (OSError, ValueError, IndexError):
        return None
