"""The folder of a run: which one is free, and in which one a run goes on."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path


def resumed_folder(checkpoint: str | None, out: Path) -> Path | None:
    """The folder of the run that a checkpoint belongs to; None if it lies in none. `last` is that of `out`."""
    if checkpoint is None or not Path(checkpoint).suffix:
        return None if checkpoint is None else out
    folder = Path(checkpoint).parent.parent
    return folder if (folder / "config.yaml").exists() else None


def free_folder(folder: Path) -> Path:
    """The folder itself if no run lies in it, else the same name with the next free number."""
    if not (folder / "config.yaml").exists():
        return folder
    number = 2
    while (folder.with_name(f"{folder.name}-{number}") / "config.yaml").exists():
        number += 1
    return folder.with_name(f"{folder.name}-{number}")


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
