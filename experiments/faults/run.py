"""Break runs off in every way that a machine does, let them go on, and compare with those that were left alone.

    nice python experiments/faults/run.py --kills 200

A process that has imported everything forks one for each attempt: `lit-align fit -c run.yaml --ckpt_path last`. Killed
at a random moment, by the clock or at one of its file operations, it is started again until it gets to its end.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"

import argparse  # noqa: E402 - after what they read at import
import collections  # noqa: E402
import json  # noqa: E402
import platform  # noqa: E402
import random  # noqa: E402
import shutil  # noqa: E402
import signal  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402
import time  # noqa: E402
import traceback  # noqa: E402
from collections.abc import Callable  # noqa: E402
from dataclasses import asdict, dataclass, field  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

sys.path.insert(0, str(Path(__file__).parent))
import cases  # noqa: E402
import compare  # noqa: E402
import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402

import lit_align.cli  # noqa: E402, F401 - so that children need not import it
from lit_align.__main__ import entry  # noqa: E402

torch.set_num_threads(1)
LIMIT = 300.0  # seconds, for an attempt: longer is a hang
KINDS = ("clock", "training", "file", "file+")


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


@dataclass
class Count:
    """What happened to the runs of a method."""

    runs: int = 0
    kills: collections.Counter[str] = field(default_factory=collections.Counter)
    differ: list[str] = field(default_factory=list)
    lost_or_torn: list[str] = field(default_factory=list)


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


def kill_somewhere(place: Path, whole: Whole, file: Path, out: Path, kind: str, rng: random.Random) -> str | None:
    """One attempt, killed; returns the moment, or None where it came to its end before."""
    cache, log = out.with_suffix(".cache"), out.with_suffix(".log")
    moment = place / "moment"
    moment.unlink(missing_ok=True)
    hook = None
    if kind.startswith("file"):
        chosen, delay = rng.randint(1, whole.operations), rng.random() * 0.01 if kind == "file+" else 0.0

        def act(number: int, name: str) -> None:
            if number == chosen:
                descriptor = os.open(moment, os.O_CREAT | os.O_WRONLY)
                os.write(descriptor, name.encode())
                if delay:  # the operation goes on while the time runs out
                    signal.signal(signal.SIGALRM, signal.SIG_DFL)
                    killer = os.fork()
                    if killer == 0:
                        time.sleep(delay)
                        os.kill(os.getppid(), signal.SIGKILL)
                        os._exit(0)
                else:
                    os.kill(os.getpid(), signal.SIGKILL)

        hook = file_operations([out, cache], act)
    pid = child(fit(file, cache, "--ckpt_path", "last", hook=hook), log)
    if not kind.startswith("file"):
        if kind == "training":
            before = (out / "metrics.csv").stat().st_mtime_ns if (out / "metrics.csv").exists() else 0
            while (code := waited(pid, 0.001)) is None:
                path = out / "metrics.csv"
                if path.exists() and path.stat().st_mtime_ns != before:
                    break
            if code is not None:
                return None if code == 0 else f"ended with {code}"
        code = waited(pid, rng.random() * whole.seconds * (0.3 if kind == "training" else 1.0))
        if code is not None:
            return None if code == 0 else f"ended with {code}"
        os.kill(pid, signal.SIGKILL)
    code = waited(pid)
    if code is None:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        return "hung"
    if code == -signal.SIGKILL:
        return f"killed: {moment.read_text() if moment.exists() else kind}"
    return None if code == 0 else f"ended with {code}"


def killed_runs(place: Path, kills: int, seed: int) -> dict[str, Count]:
    """Kill until there are as many, turning from module to module and from one way of saving to the next."""
    rng = random.Random(seed)
    counts = {method: Count() for method in cases.METHODS}
    plan = [(method, way) for way in cases.WAYS for method in cases.METHODS]
    wholes: dict[tuple[str, str], Whole] = {}
    number, total = 0, 0
    with tqdm(total=kills, desc="kills", smoothing=0) as bar:
        while total < kills or number % len(cases.METHODS):
            method, way = plan[number % len(plan)]
            number += 1
            if (method, way) not in wholes:
                wholes[method, way] = left_alone(place, method, way)
            whole, count, out = wholes[method, way], counts[method], place / "broken" / f"{number}-{method}"
            out.parent.mkdir(exist_ok=True)
            file, log = cases.write(place, method, way, out), out.with_suffix(".log")
            count.runs += 1
            step = 0
            for _ in range(rng.randint(1, 5)):
                kind = rng.choice(KINDS)
                moment = kill_somewhere(place, whole, file, out, kind, rng)
                if moment is None:
                    break
                if not moment.startswith("killed"):
                    count.differ.append(f"{method}, {way}: an attempt {moment}; {log.read_text()[-2000:]}")
                    break
                count.kills[kind] += 1
                total += 1
                bar.update()
                wrong, step = compare.damage(out, step)
                count.lost_or_torn += [f"{method}, {way}, {moment}: {line}" for line in wrong]
            code = waited(child(fit(file, out.with_suffix(".cache"), "--ckpt_path", "last"), log))
            differing = (
                compare.differences(whole.out, out) if code == 0 else [f"ended with {code}: {log.read_text()[-2000:]}"]
            )
            count.differ += [f"{method}, {way}: {line}" for line in differing[:3]]
            if not differing:
                for path in (out, out.with_suffix(".cache")):
                    shutil.rmtree(path, ignore_errors=True)
    return counts


def main(arguments: list[str] | None = None) -> int:
    """Run the table; the exit status says whether anything was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--only", choices=("kills", "faults"), help="one half of the table; the other stays")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="for the table")
    parser.add_argument("--place", type=Path, help="folder for the runs; a temporary one by default")
    told = parser.parse_args(arguments)
    place = (told.place or Path(tempfile.mkdtemp(prefix="faults-"))).resolve()
    place.mkdir(parents=True, exist_ok=True)
    code = waited(child(lambda: cases.prepare(place) or 0, place / "prepare.log"))
    if code != 0:
        raise SystemExit((place / "prepare.log").read_text())
    import faults  # beside this file

    file = told.out / "faults.json"
    result: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    wrong = False
    if told.only != "kills":
        import faults  # beside this file, and it imports this one

        result["faults"] = faults.all_of_them(place)
        wrong |= not all(fault["as_expected"] for fault in result["faults"])
    if told.only != "faults":
        counts = killed_runs(place, told.kills, told.seed)
        wrong |= any(count.differ or count.lost_or_torn for count in counts.values())
        result |= {
            "kills": sum(sum(count.kills.values()) for count in counts.values()),
            "seed": told.seed,
            "modules": {method: asdict(count) for method, count in counts.items()},
        }
    result |= {"python": platform.python_version(), "torch": torch.__version__}
    told.out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(result, indent=2).replace(str(place), "PLACE")
    file.write_text(text + "\n")
    table = compare.table(json.loads(text))
    (told.out / "faults.md").write_text(table)
    print(table)
    if not wrong and told.place is None:
        shutil.rmtree(place)
    else:
        print(f"what is left of the runs: {place}")
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
