"""Break runs off in every way that a machine does, let them go on, and compare with those that were left alone.

    nice python experiments/faults/run.py --kills 200 --seeds 0 1

A process that has imported everything forks one for each attempt: `lit-align fit -c run.yaml --ckpt_path last`. Killed
at a random moment, by the clock or at one of its file operations, it is started again until it gets to its end.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import platform
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import cases
import compare
import faults
from attempt import Whole, child, file_operations, fit, left_alone, waited
from torch import __version__ as torch_version
from tqdm import tqdm

KINDS = ("clock", "training", "file", "file+")


@dataclass
class Count:
    """What happened to the runs of a method."""

    runs: int = 0
    kills: collections.Counter[str] = field(default_factory=collections.Counter)
    differ: list[str] = field(default_factory=list)
    lost_or_torn: list[str] = field(default_factory=list)


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


def killed_runs(place: Path, kills: int, seed: int, minutes: float) -> dict[str, Count]:
    """Kill until there are as many, turning from module to module and from one way of saving to the next."""
    end = time.monotonic() + 60 * minutes
    rng = random.Random(seed)
    counts = {method: Count() for method in cases.METHODS}
    plan = [(method, way) for way in cases.WAYS for method in cases.METHODS]
    wholes: dict[tuple[str, str], Whole] = {}
    number, total = 0, 0
    with tqdm(total=kills, desc=f"kills, seed {seed}", position=seed, smoothing=0) as bar:
        while (total < kills or number % len(cases.METHODS)) and time.monotonic() < end:
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


def everything_of(place: Path, kills: int, seeds: list[int], minutes: float) -> dict[str, Any]:
    """The kills of several seeds, each in a process of its own, counted together."""
    processes = {}
    for seed in seeds:
        if (pid := os.fork()) == 0:
            try:
                folder = place / f"seed-{seed}"
                folder.mkdir(exist_ok=True)
                prepared(folder)
                counts = killed_runs(folder, -(-kills // len(seeds)), seed, minutes)
                told = {method: {**vars(count), "kills": dict(count.kills)} for method, count in counts.items()}
                (place / f"seed-{seed}.json").write_text(json.dumps(told))
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        processes[seed] = pid
    modules: dict[str, Any] = {}
    for seed, pid in processes.items():
        if os.waitpid(pid, 0)[1] != 0:
            raise SystemExit(f"the runs of seed {seed} came to no end")
        for method, count in json.loads((place / f"seed-{seed}.json").read_text()).items():
            so_far = modules.setdefault(method, {"runs": 0, "kills": {}, "differ": [], "lost_or_torn": []})
            for key in ("runs", "differ", "lost_or_torn"):
                so_far[key] += count[key]
            so_far["kills"] = dict(collections.Counter(so_far["kills"]) + collections.Counter(count["kills"]))
    return modules


def prepared(place: Path) -> None:
    """Model and rows, made by a process that ends: one that has trained or exported cannot be forked safely."""
    if waited(child(lambda: cases.prepare(place) or 0, place / "prepare.log")) != 0:
        raise SystemExit((place / "prepare.log").read_text())


def main(arguments: list[str] | None = None) -> int:
    """Run the table; the exit status says whether anything was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--minutes", type=float, default=120.0, help="begin no run after so many")
    parser.add_argument("--only", choices=("kills", "faults"), help="one half of the table; the other stays")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="a process for each shares the kills")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="for the table")
    parser.add_argument("--place", type=Path, help="folder for the runs; a temporary one by default")
    told = parser.parse_args(arguments)
    place = (told.place or Path(tempfile.mkdtemp(prefix="faults-"))).resolve()
    place.mkdir(parents=True, exist_ok=True)
    file = told.out / "faults.json"
    result: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    wrong = False
    if told.only != "kills":
        prepared(place)
        result["faults"] = faults.all_of_them(place)
        wrong |= not all(fault["as_expected"] for fault in result["faults"])
    if told.only != "faults":
        modules = everything_of(place, told.kills, told.seeds, told.minutes)
        wrong |= any(count["differ"] or count["lost_or_torn"] for count in modules.values())
        result |= {"kills": sum(sum(count["kills"].values()) for count in modules.values()), "seeds": told.seeds}
        result |= {"modules": modules}
    result |= {"python": platform.python_version(), "torch": torch_version}
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
