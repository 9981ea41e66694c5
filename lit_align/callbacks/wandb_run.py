"""One run of Weights & Biases for one run here, however often it is interrupted: its id lies in manifest.json."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, WandbLogger

# An agent, or the user, names a run by it.
VARIABLE = "WANDB_RUN_ID"


def tracked(loggers: Iterable[Logger]) -> dict[str, Any] | None:
    """Id and project of the run that a logger has begun; None without one."""
    for logger in loggers:
        if isinstance(logger, WandbLogger) and logger.version:
            return {"id": str(logger.version), "project": str(logger.name)}
    return None


def known(manifest: Path) -> dict[str, Any] | None:
    """What `tracked` said when the run's manifest was written."""
    try:
        told = json.loads(manifest.read_text()).get("wandb")
    except (OSError, ValueError, AttributeError):
        return None
    return told if isinstance(told, dict) and isinstance(told.get("id"), str) else None


def go_on(out: Path, loggers: Iterable[Any]) -> str | None:
    """Have W&B go on in the run that the folder's run began.

    Args:
        out: folder of the run that is resumed.
        loggers: those of the Trainer, before they begin anything.

    Returns:
        A line that says so; None where there is nothing to go on with, or where the user or an agent names the run.
    """
    told = known(out / "manifest.json")
    mine = [logger for logger in loggers if isinstance(logger, WandbLogger) and logger.version is None]
    if told is None or not mine or VARIABLE in os.environ:
        return None
    # Private, because nothing public sets it after the logger is made. In the configuration, a new run with that
    # configuration would go on, too; and W&B reads the environment once in a process.
    mine[0]._id = mine[0]._wandb_init["id"] = told["id"]
    return f"goes on in W&B's run {told['id']} of {told.get('project')}"
