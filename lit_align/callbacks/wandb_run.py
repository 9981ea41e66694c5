"""One run of Weights & Biases for one run here, however often it is interrupted: its id lies in manifest.json."""

from __future__ import annotations

import contextlib
import json
import os
import pydoc
from collections.abc import Iterable, Iterator
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


@contextlib.contextmanager
def go_on(out: Path, trainer: Any) -> Iterator[str | None]:
    """Name the run that the folder's run began in the options of a W&B logger, until the end of the block.

    The loggers are to be made within. The configuration that is saved does not hold the name: a new run with it would
    go on in the same run of W&B.

    Args:
        out: folder of the run that is resumed.
        trainer: the configuration of the Trainer; None if no run is resumed.

    Yields:
        A line that says so; None where there is nothing to go on with, or where the user or an agent names the run.
    """
    told = known(out / "manifest.json")
    loggers: Any = getattr(trainer, "logger", None)
    options = [
        logger.init_args for logger in (loggers if isinstance(loggers, list) else [loggers]) if _is_wandb(logger)
    ]
    mine = [given for given in options if given.get("id") is None and given.get("version") is None]
    if told is None or not mine or VARIABLE in os.environ:
        yield None
        return
    mine[0].id = told["id"]
    try:
        yield f"goes on in W&B's run {told['id']} of {told.get('project')}"
    finally:
        mine[0].id = None


def _is_wandb(logger: Any) -> bool:
    """Whether a configuration is of a W&B logger."""
    kind = pydoc.locate(getattr(logger, "class_path", None) or "")
    return isinstance(kind, type) and issubclass(kind, WandbLogger)
