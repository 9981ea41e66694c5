"""One run at a time writes into a folder: real processes begun together, dead owners, other machines, other ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from lit_align.utils import claim
from lit_align.utils.claim import LOCK, InUseError, held, released, take, taken

# Waits for the file `go`, claims, says who won, and holds until the file `end` is there.
RACER = """
import sys, time
from pathlib import Path
from lit_align.utils.claim import InUseError, take
folder, go, end = map(Path, sys.argv[1:])
while not go.exists():
    time.sleep(0.001)
try:
    take(folder)
    print("mine", flush=True)
except InUseError as error:
    print(error, flush=True)
while not end.exists():
    time.sleep(0.01)
"""


def racers(tmp_path: Path, count: int) -> list[str]:
    """What each of several processes that claim one folder at the same moment says."""
    go, end = tmp_path / "go", tmp_path / "end"
    command = [sys.executable, "-c", RACER, str(tmp_path / "run"), str(go), str(end)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(count)]
    time.sleep(0.5)
    go.touch()
    said = [process.stdout.readline().strip() for process in processes if process.stdout is not None]
    end.touch()
    for process in processes:
        process.communicate(timeout=20)
    return said


def owner(**changes: Any) -> dict[str, Any]:
    return {**claim._me(), **changes}


def locked(folder: Path, **changes: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / LOCK).write_text(json.dumps(owner(**changes)))
    return folder / LOCK


# Kills: a look before the claim; a claim that appears before its content; no check whether its owner is alive.
@pytest.mark.parametrize("stale", [False, True])
def test_of_processes_begun_together_one_has_the_folder(tmp_path: Path, stale: bool) -> None:
    if stale:
        ended = subprocess.Popen([sys.executable, "-c", ""])
        ended.wait()
        locked(tmp_path / "run", pid=ended.pid, born="1")
    said = racers(tmp_path, 6)
    assert said.count("mine") == 1
    assert all("is in use by another run (process " in line for line in said if line != "mine")
    assert [path.name for path in (tmp_path / "run").iterdir()] == [LOCK]  # of the winner, who did not release it
    with held(tmp_path / "run"):  # now it is dead
        pass
    assert not (tmp_path / "run" / LOCK).exists()


# Kills: a killed process that its parent has not waited for, taken for one that writes.
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="no /proc")
def test_a_killed_owner_that_is_not_waited_for_is_dead(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    locked(tmp_path / "run", pid=process.pid, born=claim._born(process.pid))
    with pytest.raises(InUseError):
        take(tmp_path / "run")
    process.kill()
    deadline = time.monotonic() + 10
    while claim._born(process.pid) is not None and time.monotonic() < deadline:
        time.sleep(0.01)
    with held(tmp_path / "run"):
        pass
    process.wait()


def test_a_claim_ends_with_what_it_made(tmp_path: Path) -> None:
    with released():
        assert taken(tmp_path / "a" / "b")
        assert not taken(tmp_path / "a" / "b")
        with pytest.raises(InUseError, match=r"b is in use by another run \(process \d+ on .*: wait for its end"):
            take(tmp_path / "a" / "b")
    assert not (tmp_path / "a").exists()
    with released():
        taken(tmp_path / "a" / "b")
        (tmp_path / "a" / "b" / "file").touch()
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["file"]


def test_a_process_that_has_the_number_of_a_dead_one_is_another(tmp_path: Path) -> None:
    locked(tmp_path / "run", born="1")
    with held(tmp_path / "run"):
        assert json.loads((tmp_path / "run" / LOCK).read_text())["born"] != "1"


def test_one_that_cannot_be_read_names_the_file(tmp_path: Path) -> None:
    (tmp_path / LOCK).write_text("")
    with pytest.raises(InUseError, match=f"remove .*{LOCK}"):
        take(tmp_path)


# Kills: pids of another machine looked up here; clocks compared; a live owner taken for dead.
@pytest.mark.parametrize("alive", [False, True])
def test_the_owner_on_another_machine_is_alive_while_it_touches(
    tmp_path: Path, alive: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claim, "SILENCE", 1.0)
    lock = locked(tmp_path / "run", host="elsewhere", system="elsewhere", pid=os.getpid())
    os.utime(lock, (9e9, 9e9))  # its clock is ahead
    said: list[str] = []
    if not alive:
        with held(tmp_path / "run", said.append):
            pass
    else:
        touch = threading.Timer(0.3, lambda: os.utime(lock, (9e9 + 1, 9e9 + 1)))
        touch.start()
        with pytest.raises(InUseError, match="on elsewhere, since"):
            take(tmp_path / "run", wait=True, say=said.append)
    assert "waiting up to 1 s to see whether that run is still alive" in said[0]
    monkeypatch.setattr(claim, "SILENCE", 60.0)
    locked(tmp_path / "other", host="elsewhere", system="elsewhere")
    assert not taken(tmp_path / "other")  # a new run has other names to go to


def test_the_lock_is_touched_while_it_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claim, "BEAT", 0.05)
    with held(tmp_path):
        os.utime(tmp_path / LOCK, (0, 0))
        end = time.monotonic() + 20
        while (tmp_path / LOCK).stat().st_mtime == 0 and time.monotonic() < end:
            time.sleep(0.05)
        assert (tmp_path / LOCK).stat().st_mtime > 0


def test_a_job_that_slurm_starts_again_needs_not_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    locked(tmp_path, host="elsewhere", system="elsewhere", job="7", restart=None)
    with held(tmp_path):
        pass


# Kills: each rank claiming for itself.
@pytest.mark.parametrize("launcher", ["torchrun", "children"])
def test_other_ranks_share_the_claim_of_the_first(
    tmp_path: Path, launcher: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = tmp_path / "run"
    if launcher == "torchrun":
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "abc")
        locked(asked, run="another run's")
    with released():
        got = tmp_path / "run-2"
        take(got)
        if launcher == "children":
            claim.share(asked, got)
        monkeypatch.setenv("LOCAL_RANK", "1")
        assert claim.follow(asked) == got
        with released():
            assert taken(got)
        assert (got / LOCK).exists()  # a rank does not release what it shares


# Kills: the claim that a killed run on another machine left, of the same address and port, followed by a later run.
@pytest.mark.parametrize("alive", [False, True])
def test_a_rank_on_another_machine_follows_a_claim_that_is_touched(
    tmp_path: Path, alive: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "abc")
    monkeypatch.setattr(claim, "BEAT", 0.5)
    monkeypatch.setattr(claim, "FOLLOW", 1.5)
    lock = locked(tmp_path / "run", host="elsewhere", system="elsewhere", run=claim._run())
    touch = threading.Timer(0.3, lambda: os.utime(lock, (9e9, 9e9)))
    if alive:
        touch.start()
    assert claim.follow(tmp_path / "run") == (tmp_path / "run" if alive else None)


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "run").touch()
    with pytest.raises(OSError, match="run is a file: --out must name a folder"):
        take(tmp_path / "run")
