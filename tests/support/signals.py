"""What sends a signal to its own process at a chosen moment: a callback, and a reward that is slow."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lit_align.data.source import Rows
from support.runs import echo


class Send(Callback):
    """Sends a signal at a hook, once.

    Args:
        hook: name of the hook.
        number: of the signal.
        times: how often in a row.
        step: of how many optimizer steps at least.
    """

    def __init__(self, hook: str, number: int = signal.SIGTERM, times: int = 1, step: int = 0) -> None:
        self.sent = False

        def send(trainer: Trainer, module: LightningModule, *call: Any, **named: Any) -> None:
            if not self.sent and trainer.global_step >= step:
                self.sent = True
                for _ in range(times):
                    os.kill(os.getpid(), number)

        setattr(self, hook, send)


SLOW = {"calls": 0, "at": 0, "number": 0}


def slow(rows: list[dict], completions: list[str]) -> list[float]:
    """`echo`, which in a chosen call gets a signal and then takes half a minute."""
    SLOW["calls"] += 1
    if SLOW["calls"] == SLOW["at"]:
        os.kill(os.getpid(), SLOW["number"])
        time.sleep(30)
    return echo(rows, completions)


def leave(rows: list[dict], completions: list[str]) -> list[float]:
    """Ends the process as if all were done."""
    sys.exit(0)


class Leaves(Rows):
    """A source of rows that ends the process."""

    def __iter__(self) -> Any:
        """Leave."""
        sys.exit(0)


class LeavingStep:
    """A step of a pipeline that ends the process."""

    def run(self, out: Path) -> dict[str, float]:
        """Leave."""
        sys.exit(0)
