"""Context managers around Lightning's commands: filter its messages, and end its Weights & Biases run."""

from __future__ import annotations

import contextlib
import logging
import re
import sys
import warnings
from collections.abc import Iterator
from typing import Any

from lit_align.utils.display import escape_record


@contextlib.contextmanager
def own_wandb_run() -> Iterator[None]:
    """Finish a Weights & Biases run that began inside the block, so that the next command starts its own."""

    def current() -> Any:
        return getattr(sys.modules.get("wandb"), "run", None)

    before = current()
    code = 1
    try:
        yield
        code = 0
    finally:
        if before is None and current() is not None:
            current().finish(exit_code=code)


@contextlib.contextmanager
def quiet_start() -> Iterator[None]:
    """Filter Lightning's advertisements and its reports of missing hardware."""
    lines = re.compile(r"💡|TPU available|HPU available|GPU available: False|Seed set to|`Trainer\.\w+` stopped")
    loggers = [logging.getLogger(name) for name in _TALKATIVE]

    def wanted(record: logging.LogRecord) -> bool:
        return not lines.search(record.getMessage())

    for logger in loggers:
        logger.addFilter(wanted)
        logger.addFilter(escape_record)
    try:
        with warnings.catch_warnings():
            for message in _UPSTREAM:
                warnings.filterwarnings("ignore", message=message)
            yield
    finally:
        for logger in loggers:
            logger.removeFilter(wanted)
            logger.removeFilter(escape_record)


# Warnings that do not concern the user's run, by their beginnings.
_UPSTREAM = (
    r"LightningCLI's args parameter is intended",
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",
    r"The '\w+' does not have many workers",
    r"GPU available but not used",  # on a Mac, which `fit` explains itself
    r"Total length of `list` across ranks is zero",  # no validation, as the data module was told
    r"Couldn't infer the batch indices fetched from your dataloader",
    r"The number of training batches \(\d+\) is smaller than the logging interval",
    r"Checkpoint directory .* exists and is not empty",
    r"The dirpath has changed from",  # of checkpoints: a run may be looked at from another folder
    r"Be aware that when using `ckpt_path`, callbacks used to create",  # validate needs none of fit's callbacks
    r"Using ModelCheckpoint with manual optimization",  # it holds the weights after the step, as it should
    r"(?s)\s*.{0,80}deprecated in v4",  # of jsonargparse, by Lightning
    r"\s*By default only one JsonargparseDeprecationWarning",
)
_TALKATIVE = (
    "lightning.pytorch.utilities.rank_zero",
    "lightning.fabric.utilities.rank_zero",
    "lightning.fabric.utilities.seed",
)
