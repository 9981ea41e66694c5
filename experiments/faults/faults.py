"""The other faults of the table: a full disk, a damaged checkpoint, a killed worker, SIGTERM."""

from __future__ import annotations

import ctypes
import json
import os
import random
import resource
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cases
import compare
from attempt import LIMIT, Whole, child, file_operations, fit, left_alone, waited

from lit_align.callbacks import AtomicCheckpointIO
from lit_align.utils.claim import LOCK

SAVING = "between validations"
WORKER = "without validation, a worker"
TERMS = 12

Fault = dict[str, Any]


def all_of_them(place: Path) -> list[Fault]:
    """Each is told by what the console said, and is as expected if nothing was lost and the run went on exactly."""
    wholes = {(method, way): left_alone(place, method, way) for method, way in (("sft", SAVING), ("sft", WORKER))}
    told = [
        *(disk_full(place, wholes["sft", SAVING], what) for what in ("checkpoint", "export")),
        *(damaged(place, wholes["sft", SAVING], how) for how in DAMAGE),
        worker_killed(place, wholes["sft", WORKER]),
    ]
    return [*told, *(terminated(place, left_alone(place, method, SAVING), method) for method in cases.METHODS)]


def _begin(place: Path, way: str, name: str, method: str = "sft") -> tuple[Path, Path, Path]:
    """The configuration of a run, its folder and its log."""
    out = place / "faults" / name
    out.parent.mkdir(exist_ok=True)
    return cases.write(place, method, way, out), out, out.with_suffix(".log")


def _killed_at(number: int, out: Path) -> Callable[[], None]:
    """Kill -9 when the link to the last checkpoint leads to the n-th."""
    count = 0

    def act(_: int, name: str) -> None:
        nonlocal count
        count += name == "os.rename .last.ckpt.partial"
        if count == number:
            os.kill(os.getpid(), signal.SIGKILL)

    return file_operations([out], act)


def _said(log: Path) -> str:
    """The error that the console showed; a traceback is none."""
    lines = [line for line in log.read_text().splitlines() if line.startswith(("lit-align: ", "Traceback"))]
    return lines[-1].removeprefix("lit-align: ") if lines else "nothing"


def _goes_on(whole: Whole, file: Path, out: Path, log: Path, checkpoint: str = "last") -> list[str]:
    """How the run, taken up again, differs from the one that was left alone."""
    code = waited(child(fit(file, out.with_suffix(".cache"), "--ckpt_path", checkpoint), log))
    return compare.differences(whole.out, out) if code == 0 else [f"ended with {code}: {_said(log)}"]


def _judged(name: str, said: str, wrong: list[str], place: Path, code: int | None, wanted: int = 1) -> Fault:
    if code != wanted:
        wrong.append(f"exit status {code}, expected {wanted}")
    if said in ("nothing", "") or said.startswith("Traceback"):
        wrong.append("no error in one line")
    return {
        "fault": name,
        "told": said.replace(str(place), "PLACE"),
        "wrong": wrong,
        "as_expected": not wrong,
    }


def disk_full(place: Path, whole: Whole, what: str) -> Fault:
    """No room for the next checkpoint, or for the exported model, on a disk of its own where one can be mounted."""
    file, out, log = _begin(place, SAVING, f"full-{what}")
    cache = out.with_suffix(".cache")
    out.mkdir()
    report = place / "faults" / f"full-{what}.report"

    def work() -> int:
        """In a process of its own, whose mount goes with it."""
        mounted = _mount(out, "4m")
        last = out / "checkpoints" / "last.ckpt"
        # Half of the run; in the other case all but its export.
        code = waited(child(fit(file, cache, hook=_killed_at(4, out) if what == "checkpoint" else None), log))
        before = last.read_bytes()
        if what == "export":
            shutil.rmtree(out / "model")
        if mounted:
            with (out / "ballast").open("wb") as ballast:
                free = shutil.disk_usage(out).free
                ballast.write(bytes(max(0, free - len(before) // 4)))
        log.write_text("")

        def cramped() -> int:
            if not mounted:
                resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 4, len(before) // 4))
            return fit(file, cache, "--ckpt_path", "last")()

        code = waited(child(cramped, log))
        said = _said(log)
        wrong = [] if last.read_bytes() == before else ["the checkpoint before is not what it was"]
        partial = [path.name for path in out.rglob("*partial*")]
        wrong += [f"left over: {partial}"] if partial else []
        (out / "ballast").unlink(missing_ok=True)
        wrong += _goes_on(whole, file, out, log)
        report.write_text(json.dumps([said, wrong, code, mounted]))
        return 0

    if waited(child(work, out.with_suffix(".outer"))) != 0:
        return _judged(f"disk full during {what}", "", [out.with_suffix(".outer").read_text()], place, None)
    said, wrong, code, mounted = json.loads(report.read_text())
    kind = "a file system of 4 MiB" if mounted else "a limit on the size of files"
    return _judged(f"disk full, {what} ({kind})", said, wrong, place, code)


def _mount(folder: Path, size: str) -> bool:
    """A small file system in memory over a folder, for this process alone; False where that is not allowed."""
    libc = ctypes.CDLL(None, use_errno=True)
    new_mounts, new_user, private, recursive = 0x00020000, 0x10000000, 1 << 18, 1 << 14
    user, group = os.getuid(), os.getgid()
    if user == 0:
        if libc.unshare(new_mounts) != 0:
            return False
    else:
        if libc.unshare(new_mounts | new_user) != 0:
            return False
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    libc.mount(None, b"/", None, private | recursive, None)
    return bool(libc.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", 0, f"size={size}".encode()) == 0)


def _half(content: bytes) -> bytes:
    return content[: len(content) // 2]


def _flipped(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "cut in half": _half,
    "empty": lambda content: b"",
    "zeros": lambda content: bytes(len(content)),
    "one bit flipped": _flipped,
    "another file": lambda content: b'{"step": 1}\n',
}


def damaged(place: Path, whole: Whole, how: str) -> Fault:
    """A last checkpoint that is not what was written: refused, with the name of another one."""
    file, out, log = _begin(place, SAVING, f"damaged-{how.replace(' ', '-')}")
    cache = out.with_suffix(".cache")
    waited(child(fit(file, cache, "--checkpoint.save_top_k=-1", hook=_killed_at(5, out)), log))
    last = (out / "checkpoints" / "last.ckpt").resolve()
    # The newest other one: it may have been written, and the link not yet be led to it.
    others = [path for path in last.parent.glob("epoch*.ckpt") if path.resolve() != last]
    before = max(others, key=lambda path: path.stat().st_mtime)
    last.write_bytes(DAMAGE[how](last.read_bytes()))
    files = _files(out)
    log.write_text("")
    code = waited(child(fit(file, cache, "--ckpt_path", "last"), log))
    said, wrong = _said(log), []
    if str(before) not in said or "last.ckpt" not in said:
        wrong.append("the message does not name the checkpoint, or another one")
    if _files(out) != files:
        wrong.append("files came or went")
    last.unlink()
    (out / "checkpoints" / "last.ckpt").unlink()
    wrong += [
        line
        for line in _goes_on(whole, file, out, log, str(before))
        if "files:" not in line  # all were kept
    ]
    return _judged(f"last checkpoint {how}", said, wrong, place, code)


def _files(out: Path) -> list[str]:
    """All files of a run but its claim, which the next process takes over from a killed one and then removes."""
    return sorted(str(path) for path in out.rglob("*") if path.name != LOCK)


def _children(pid: int) -> list[int]:
    told = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(one) for one in told.read_text().split()] if told.exists() else []


def worker_killed(place: Path, whole: Whole) -> Fault:
    """The process that builds batches is killed in the middle of training."""
    file, out, log = _begin(place, WORKER, "worker")
    pid = child(fit(file, out.with_suffix(".cache")), log)
    end = time.monotonic() + LIMIT
    while not (out / "metrics.csv").exists() and time.monotonic() < end and waited(pid, 0.001) is None:
        pass
    for worker in _children(pid):
        os.kill(worker, signal.SIGKILL)
    code = waited(pid)
    said = _said(log)
    wrong = [] if "data.num_workers" in said else ["the message does not say what to do"]
    return _judged("worker process killed", said, [*wrong, *_goes_on(whole, file, out, log)], place, code)


def terminated(place: Path, whole: Whole, method: str) -> Fault:
    """SIGTERM at random moments of training: saved and left with 143 each time, and gone on from."""
    rng = random.Random(method)
    codes: list[int | None] = []
    wrong: list[str] = []
    saved = 0
    number = 0
    while len(codes) < TERMS // len(cases.METHODS):
        number += 1
        file, out, log = _begin(place, SAVING, f"term-{method}-{number}", method)
        pid = child(fit(file, out.with_suffix(".cache")), log)
        while not (out / "metrics.csv").exists() and waited(pid, 0.001) is None:
            pass
        time.sleep(rng.random() * 0.05)
        os.kill(pid, signal.SIGTERM)
        code = waited(pid)
        if code == 0:
            continue  # it had come to its end
        codes.append(code)
        if "asked to stop" in log.read_text():
            state = AtomicCheckpointIO().load_checkpoint(out / "checkpoints" / "last.ckpt")
            saved += 1
            if f"optimizer step {state['global_step']} is in" not in log.read_text():
                wrong.append("the step that was named is not that of the checkpoint")
        wrong += _goes_on(whole, file, out, log)
    said = f"{len(codes)} times, exit status {sorted(set(codes), key=str)}, {saved} with a checkpoint of that very step"
    if saved < len(codes):
        wrong.append("left without saving")
    return _judged(f"SIGTERM, {method}", said, wrong, place, max(codes, key=str), 143)
