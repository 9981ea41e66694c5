"""The folder of a run: which one is free, and in which one a run goes on."""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Callable
from pathlib import Path

from lit_align.config.errors import ConfigError
from lit_align.utils import claim
from lit_align.utils.owned import check_replaceable, check_unwritten, is_ours


def resumed_folder(checkpoint: str | None, out: Path) -> Path | None:
    """The folder of the run that a checkpoint belongs to; None if it lies in none. `last` is that of `out`."""
    if checkpoint is None or not Path(checkpoint).suffix:
        return None if checkpoint is None else out
    folder = Path(checkpoint).parent.parent
    return folder if (folder / "config.yaml").exists() else None


def holds_run(folder: Path) -> bool:
    """True if a run has left its configuration in a folder."""
    return (folder / "config.yaml").exists()


def free_folder(
    folder: Path, take: Callable[[Path], bool] = lambda path: True, holds: Callable[[Path], bool] = holds_run
) -> Path:
    """The folder itself if no run lies in it, else the same name with the next free number.

    Args:
        folder: which.
        take: claims a folder; false if another run has it, which is as good as one that lies in it.
        holds: true for a folder that holds a run.

    Raises:
        ConfigError: a run lies in it, and it has no name that a number could follow.
    """
    for number in itertools.count(1):
        if number == 2 and folder.name in ("", ".."):
            raise ConfigError(f"--out {folder} holds another run or its config.yaml: name a folder for this one")
        path = folder if number == 1 else folder.with_name(f"{folder.name}-{number}")
        # Looked at once more when it is claimed: the run that had it may have ended between the two.
        if not holds(path) and take(path) and not holds(path):
            return path
    raise AssertionError


def claimed_folder(folder: Path, reuse: bool = False, say: Callable[[str], None] = print) -> Path:
    """`free_folder`, claimed until the command ends; in other processes of a distributed run, that of rank 0.

    Args:
        folder: which.
        reuse: use the folder of a run that failed before its first checkpoint; its configuration and metrics are kept
            under other names.
        say: tells the user about that.
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
    """True for the folder of a run that ended with neither a checkpoint nor a model: nothing can go on from it."""
    left = [*(folder / "checkpoints").glob("*"), *(folder / "model").glob("*")]
    return holds_run(folder) and is_ours(folder) and not left


def way_back(folder: Path) -> str:
    """How to go on with the run in a folder, if it has not ended; else nothing."""
    if (folder / "model").is_dir() or not (folder / "checkpoints" / "last.ckpt").exists():
        return ""
    return "; the other one has not ended: to resume it instead, add --ckpt_path last"


# What a command writes into its folder, beside config.yaml and what its callbacks are told to write.
_WRITTEN = {
    "fit": ("manifest.json", "metrics.csv", "said.jsonl", "checkpoints", "model"),
    "predict": ("manifest.json", "metrics.csv", "completions.jsonl"),
}


def check_writable(folder: Path, command: str) -> None:
    """Refuse a folder in which the command would write over what is not of lit_align.

    Raises:
        FileExistsError: names the file, and the way out.
    """
    if claim.other_rank():
        return
    check_unwritten(folder, _WRITTEN.get(command, ("metrics.csv",)))
    if command == "fit":
        check_replaceable(folder / "model")


def requeued_folder(folder: Path) -> Path | None:
    """The folder in which this job of SLURM's began, if SLURM has started it again: this one, or one of its numbers."""
    job = os.environ.get("SLURM_JOB_ID")
    if job is None or not int(os.environ.get("SLURM_RESTART_COUNT") or 0):
        return None
    numbers = {}
    for manifest in folder.parent.glob("*/manifest.json"):
        named = re.fullmatch(re.escape(folder.name) + r"(?:-(\d+))?", manifest.parent.name)
        if named and json.loads(manifest.read_text()).get("slurm_job") == job:
            numbers[int(named[1] or 1)] = manifest.parent
    return numbers[max(numbers)] if numbers else None
