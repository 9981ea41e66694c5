"""Claims: one run at a time writes into a folder.

A claim is a file `.lit-align.lock` in the folder that names its owner process. A hard link creates the file together
with its content, and it succeeds for exactly one process, on network file systems too. The run removes it at its end.

A killed run leaves its claim behind. On the same machine, the process table shows that the owner is gone. A claim from
another machine or container counts as alive while its file is touched: the owner touches it every few seconds. Clocks
of different machines are never compared.

The processes of one run share a claim: rank 0 makes it, and the other ranks look up the folder that rank 0 claimed.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lit_align.utils import limits

LOCK = ".lit-align.lock"
_FOLDERS = "LIT_ALIGN_CLAIMED"  # JSON for processes that rank 0 starts: requested folder -> claimed folder

BEAT = 15.0  # seconds between two touches
SILENCE = 75.0  # seconds without a touch until an owner elsewhere counts as dead; NFS caches for up to 60 s
FOLLOW = 120.0  # seconds that other ranks wait for rank 0
_LARGEST = 1 << 16  # bytes of a lock file


class InUseError(ValueError):
    """Another run holds the folder."""


class Claim:
    """The right to write into a folder, until `release`.

    Args:
        folder: the claimed folder.
        made: folders created for the claim, innermost first. `release` removes the empty ones.
        text: content of the lock file; None in a process that shares the claim of rank 0.
    """

    def __init__(self, folder: Path, made: list[Path], text: str | None) -> None:
        self.folder, self.made, self.text = folder.absolute(), made, text
        self._pid = os.getpid()

    def release(self) -> None:
        """Release the folder. A second call and a call in a forked child do nothing."""
        if self.text is None or os.getpid() != self._pid:
            return
        lock = self.folder / LOCK
        with contextlib.suppress(OSError):
            if lock.read_text() == self.text:
                lock.unlink()
        self.text = None
        with contextlib.suppress(ValueError):
            _HELD.remove(self)
        with contextlib.suppress(OSError):  # keep folders that are not empty
            for folder in self.made:
                folder.rmdir()


_HELD: list[Claim] = []
_HEART = threading.Lock()


def take(folder: Path, wait: bool = False, say: Callable[[str], None] = print) -> Claim:
    """Claim a folder, and create it if it does not exist.

    Args:
        folder: the folder to claim.
        wait: wait up to `SILENCE` seconds to find out whether an owner on another machine is alive.
        say: prints a line about the wait.

    Raises:
        InUseError: another run holds the folder; the message names the process and the way out.
        OSError: the folder cannot be written to.
    """
    if other_rank():
        return Claim(folder, [], None)
    folder = folder.absolute()
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(_me())
        while not _create(folder / LOCK, text):
            _clear(folder, wait, say)
    except InUseError:
        raise
    except FileExistsError as error:
        raise FileExistsError(f"{error.filename or folder} is a file: --out must name a folder") from error
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror}: the folder of the run cannot be written", str(folder)) from error
    claim = Claim(folder, made, text)
    _HELD.append(claim)
    _beat()
    return claim


def taken(folder: Path) -> bool:
    """Claim a folder if no other run holds it, until `released` ends. Returns whether it succeeded."""
    try:
        take(folder)
    except InUseError:
        return False
    return True


@contextlib.contextmanager
def released() -> Iterator[None]:
    """Release, at the end, all claims made inside the block."""
    before, told = list(_HELD), os.environ.get(_FOLDERS)
    try:
        yield
    finally:
        os.environ.pop(_FOLDERS, None)
        if told is not None:
            os.environ[_FOLDERS] = told
        for claim in [claim for claim in _HELD if claim not in before]:
            claim.release()


@contextlib.contextmanager
def held(folder: Path, say: Callable[[str], None] = print) -> Iterator[None]:
    """Hold a folder inside the block; see `take` with `wait`."""
    claim = take(folder, wait=True, say=say)
    try:
        yield
    finally:
        claim.release()


# Ranks of one run.


def other_rank() -> bool:
    """True in a process of a distributed run other than rank 0."""
    rank = next((os.environ[name] for name in _RANKS if name in os.environ), "0")
    return (rank.isdigit() and int(rank) > 0) or os.environ.get("NODE_RANK", "0") not in ("", "0")


_RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")  # in the order that Lightning checks them


def share(asked: Path, got: Path) -> None:
    """Pass the claimed folder on to processes that this process starts."""
    told = json.loads(os.environ.get(_FOLDERS) or "{}")
    os.environ[_FOLDERS] = json.dumps({**told, str(asked): str(got)})


def follow(asked: Path) -> Path | None:
    """Wait for rank 0 and return the folder that it claimed. None if this rank cannot find out."""
    if (told := json.loads(os.environ.get(_FOLDERS) or "{}")).get(str(asked)):
        return Path(told[str(asked)])
    run, end = _run(), time.monotonic() + FOLLOW
    named = re.compile(re.escape(asked.name) + r"(?:-\d+)?")
    dead: set[tuple[Path, str]] = set()
    while run is not None and time.monotonic() < end:
        for lock in sorted(asked.parent.glob(f"*/{LOCK}")):
            owner = _owner(lock)
            known = (lock, json.dumps(owner, sort_keys=True))
            if not named.fullmatch(lock.parent.name) or owner.get("run") != run or known in dead:
                continue
            alive = _alive(owner)
            # Rank 0 on another machine touches its claim; a killed run with the same address and port left its own.
            if alive or (alive is None and _touched(lock, 2 * BEAT)):
                return lock.parent
            dead.add(known)
        time.sleep(0.1)
    return None


def _run() -> str | None:
    """An identifier shared by the processes of one distributed run; None outside of one."""
    names: tuple[str, ...] = ("MASTER_ADDR", "MASTER_PORT")
    if "TORCHELASTIC_RUN_ID" in os.environ:
        names = ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", *names)
    elif "SLURM_STEP_ID" in os.environ and "SLURM_PROCID" in os.environ:
        names = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")
    values = [os.environ.get(name, "") for name in names]
    return " ".join(values) if any(values) else None


# One run against another.


def _me() -> dict[str, Any]:
    return {
        "pid": os.getpid(),
        "born": _born(os.getpid()),
        "host": socket.gethostname(),
        "system": _system(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        "job": os.environ.get("SLURM_JOB_ID"),
        "restart": os.environ.get("SLURM_RESTART_COUNT"),
        "run": _run(),
    }


def _system() -> str:
    """Identify the process table: equal for processes of one boot in one container."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return socket.gethostname()


def _born(pid: int) -> str | None:
    """Start time of a process in kernel units: tells reused process ids apart. None if the process has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        # A zombie is dead: it only waits for its parent to read its exit status.
        return None if fields[0] in ("Z", "X") else fields[19]
    except (OSError, IndexError):
        return None


def _alive(owner: dict[str, Any]) -> bool | None:
    """Whether the owner of a claim is alive; None if this machine cannot tell."""
    job = os.environ.get("SLURM_JOB_ID")
    if job and owner.get("job") == job and owner.get("restart") != os.environ.get("SLURM_RESTART_COUNT"):
        return False  # SLURM ends a job before it restarts it
    if owner.get("system") != _system() or not isinstance(owner.get("pid"), int):
        return None
    try:
        os.kill(owner["pid"], 0)
    except ProcessLookupError:
        return False
    except OSError:  # the process belongs to another user
        pass
    return owner.get("born") == _born(owner["pid"])


def _owner(lock: Path) -> dict[str, Any]:
    try:
        content = json.loads(limits.read_text(lock, largest=_LARGEST))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _create(lock: Path, text: str) -> bool:
    """Create the lock file together with its content; False if it exists."""
    own = lock.with_name(f"{lock.name}.{uuid.uuid4().hex}")
    try:
        own.write_text(text)
        try:
            os.link(own, lock)
        except FileExistsError:
            return False
        except OSError:  # this file system has no hard links
            return _create_exclusively(lock, text)
    finally:
        own.unlink(missing_ok=True)
    return True


def _create_exclusively(lock: Path, text: str) -> bool:
    try:
        with lock.open("x") as file:
            file.write(text)
    except FileExistsError:
        return False
    return True


def _clear(folder: Path, wait: bool, say: Callable[[str], None]) -> None:
    """Remove the claim of a dead owner.

    Raises:
        InUseError: the owner is alive, or may be.
    """
    lock = folder / LOCK
    try:
        text = limits.read_text(lock, largest=_LARGEST)
    except FileNotFoundError:
        return  # released in the meantime
    except ValueError as error:  # a pipe, a device, a folder, bytes that no run wrote
        raise InUseError(
            f"{folder} has a {LOCK} that no run wrote ({error}): remove it, or choose another --out"
        ) from error
    owner = _owner(lock)
    alive = _alive(owner)
    who = f"process {owner.get('pid', '?')} on {owner.get('host', 'an unknown host')}, since {owner.get('since', '?')}"
    if alive is None and wait:
        say(f"{folder} is claimed by {who}: waiting up to {SILENCE:.0f} s to see whether that run is still alive")
        alive = _touched(lock)
    if alive is not False:
        unsure = f"; if that process is gone, remove {lock}" if alive is None else ""
        raise InUseError(
            f"{folder} is in use by another run ({who}): wait for its end, stop it, or choose another --out{unsure}"
        )
    # Several processes may find the claim, but only one rename succeeds. Put back a claim newer than the one read.
    grave = lock.with_name(f"{lock.name}.{uuid.uuid4().hex}")
    with contextlib.suppress(FileNotFoundError):
        lock.rename(grave)
        if grave.read_text() != text:
            with contextlib.suppress(OSError):
                os.link(grave, lock)
        grave.unlink()


def _touched(lock: Path, seconds: float | None = None) -> bool:
    """Whether the owner touches its lock file within so many seconds, by default `SILENCE`."""
    seconds = SILENCE if seconds is None else seconds

    def seen() -> float:
        with lock.open() as file:  # opening the file makes NFS refresh its times
            return os.fstat(file.fileno()).st_mtime

    try:
        first, end = seen(), time.monotonic() + seconds
        while time.monotonic() < end:
            if seen() != first:
                return True
            time.sleep(min(1.0, seconds / 10))
    except FileNotFoundError:
        pass
    return False


def _beat() -> None:
    """Touch the lock files of this process from a background thread, as long as it holds any."""
    if not _HEART.acquire(blocking=False):
        return

    def beat() -> None:
        try:
            while _HELD:
                for claim in (*_HELD,):
                    with contextlib.suppress(OSError):
                        os.utime(claim.folder / LOCK)
                time.sleep(BEAT)
        finally:
            _HEART.release()

    threading.Thread(target=beat, name="lit-align claims", daemon=True).start()
