"""Choose the folder of a run: a free one, or the one of the run that is resumed."""

from __future__ import annotations

import glob
import itertools
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lightning import Trainer
from lightning.pytorch.profilers import Profiler

from lit_align.callbacks import HFExport
from lit_align.config.errors import ConfigError
from lit_align.utils import claim
from lit_align.utils.owned import check_replaceable, check_unwritten, holds_something, is_ours


def resumed_folder(checkpoint: str | None, out: Path) -> Path | None:
    """Folder of the run that a checkpoint belongs to; None if there is none. `last` means the run in `out`."""
    if checkpoint is None or not Path(checkpoint).suffix:
        return None if checkpoint is None else out
    folder = Path(checkpoint).parent.parent
    return folder if (folder / "config.yaml").exists() else None


def holds_run(folder: Path) -> bool:
    """True if the folder holds the configuration of a run."""
    return (folder / "config.yaml").exists()


def free_folder(
    folder: Path, take: Callable[[Path], bool] = lambda path: True, holds: Callable[[Path], bool] = holds_run
) -> Path:
    """Return the folder if it holds no run, else the same name with the next free number.

    Args:
        folder: the requested folder.
        take: claims a folder; returns False if another run holds it.
        holds: returns True for a folder that holds a run.

    Raises:
        ConfigError: the folder holds a run, and its name cannot take a number (`.` or `..`).
    """
    for number in itertools.count(1):
        if number == 2 and folder.name in ("", ".."):
            raise ConfigError(f"--out {folder} holds another run or its config.yaml: name a folder for this one")
        path = folder if number == 1 else folder.with_name(f"{folder.name}-{number}")
        # Check again after the claim: the run that held the folder may have ended in between.
        if not holds(path) and take(path) and not holds(path):
            return path
    raise AssertionError


def claimed_folder(folder: Path, reuse: bool = False, say: Callable[[str], None] = print) -> Path:
    """Claim a free folder until the command ends. Other ranks of a distributed run get the folder of rank 0.

    Args:
        folder: the requested folder.
        reuse: reuse the folder of a run that failed before its first checkpoint; its configuration and metrics are kept
            under other names.
        say: prints a line about that.
    """

    def holds(path: Path) -> bool:
        return holds_run(path) and not (reuse and failed_early(path))

    if claim.other_rank():
        return claim.follow(folder) or free_folder(folder, holds=holds)
    got = free_folder(folder, claim.taken, holds)
    if holds_run(got):
        kept = [
            (got / name).replace(got / f"{Path(name).stem}-failed{Path(name).suffix}").name
            for name in ("config.yaml", "metrics.csv")
            if (got / name).exists()
        ]
        say(
            f"{got}: the run before this one ended before its first checkpoint, so its folder is used again; "
            f"{' and '.join(kept)} of it are kept"
        )
    claim.share(folder, got)
    return got


def failed_early(folder: Path) -> bool:
    """True if the run in the folder left neither a checkpoint nor a model, so that nothing can resume it."""
    left = [*(folder / "checkpoints").glob("*"), *(folder / "model").glob("*")]
    return holds_run(folder) and is_ours(folder) and not left


def way_back(folder: Path) -> str:
    """Hint how to resume the run in a folder if it has not ended; else empty."""
    if (folder / "model").is_dir() or not (folder / "checkpoints" / "last.ckpt").exists():
        return ""
    return "; the other one has not ended: to resume it instead, add --ckpt_path last"


# What a command writes into its folder, besides config.yaml and the files of the user's callbacks.
_WRITTEN = {
    "fit": ("manifest.json", "metrics.csv", "said.jsonl", "checkpoints", "model"),
    "predict": ("manifest.json", "metrics.csv", "completions.jsonl"),
}


def check_writable(folder: Path, command: str) -> None:
    """Refuse a folder if the command would overwrite files there that lit_align did not write.

    Raises:
        FileExistsError: names the file, and the way out.
    """
    if claim.other_rank():
        return
    check_unwritten(folder, _WRITTEN.get(command, ("metrics.csv",)))
    if command == "fit":
        check_replaceable(folder / "model")


def check_elsewhere(trainer: Trainer, run: Path, before: str = "") -> None:
    """Refuse callbacks, loggers and profilers that would write over files outside of the run's folder.

    Args:
        trainer: whose they are.
        run: the run's folder, in which they may write.
        before: what a run that goes on was configured with: it has written to the places that stand there.

    Raises:
        FileExistsError: names the place, and the way out.
    """
    if claim.other_rank():
        return
    things = (*trainer.callbacks, *trainer.loggers, trainer.profiler)  # type: ignore[attr-defined]
    for thing in things:
        for place, given in _places(thing):
            path = Path(place).expanduser()
            if path.resolve().is_relative_to(run.resolve()) or not holds_something(path):
                continue
            if not any(str(name) in before for name in (given, os.path.relpath(given))):
                raise FileExistsError(
                    f"{type(thing).__name__} would write to {path}, outside of the run's folder, where something lies "
                    f"already: give a place inside {run}, or a new one"
                )


def _places(thing: Any) -> Iterator[tuple[str | Path, str | Path]]:
    """Folders and files that a callback, a logger or a profiler writes, each with the folder that it was given."""
    folder = getattr(thing, "dirpath", None)
    if isinstance(thing, Profiler):  # its folder is for files of others too
        if folder is not None and thing.filename is not None:
            yield from ((path, folder) for path in Path(folder).glob(f"*{glob.escape(thing.filename)}*"))
    elif not isinstance(thing, HFExport):  # which looks for itself
        found = (folder, getattr(thing, "log_dir", None), getattr(thing, "folder", None), getattr(thing, "path", None))
        for place in found:
            if isinstance(place, (str, Path)):
                yield place, getattr(thing, "save_dir", None) or place


def requeued_folder(folder: Path) -> Path | None:
    """Folder in which this SLURM job began, if SLURM has requeued it: `folder`, or the same name with a number."""
    job = os.environ.get("SLURM_JOB_ID")
    if job is None or not int(os.environ.get("SLURM_RESTART_COUNT") or 0):
        return None
    numbers = {}
    for manifest in folder.parent.glob("*/manifest.json"):
        named = re.fullmatch(re.escape(folder.name) + r"(?:-(\d+))?", manifest.parent.name)
        if named and json.loads(manifest.read_text()).get("slurm_job") == job:
            numbers[int(named[1] or 1)] = manifest.parent
    return numbers[max(numbers)] if numbers else None
