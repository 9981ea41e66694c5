"""Asked to stop: SIGTERM, Ctrl-C, and SLURM's signal before a job's time is up."""

from __future__ import annotations

import os
import signal
import subprocess
from typing import Any

from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lit_align.utils import stopping


class Preempted(SIGTERMException):
    """The run was asked to stop, and has saved: the process ends as one that the signal ended, with 143 for SIGTERM.

    Args:
        number: of the signal.
    """

    asked = True

    def __init__(self, number: int = signal.SIGTERM) -> None:
        super().__init__(128 + number)


class StopRequest:
    """Remembers that a signal came, so that the run can stop where a checkpoint is exact.

    Lightning saves from within the handler of SLURM's signal, be it in the middle of a step or of an accumulation of
    gradients; on SIGTERM it leaves without saving, as a process that succeeded; and so it does on Ctrl-C.

    A second Ctrl-C ends the run at once. While answers are sampled and scored, which may take minutes, nothing changes
    that a checkpoint holds: there the run does not wait for the end of the batch (see `unchanged`).
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self.requeue_signal: int | None = None
        self._before: dict[int, Any] = {}
        self._trainer: Trainer | None = None

    def listen(self, trainer: Trainer) -> None:
        """Take the place of Lightning's handlers, until it restores at the end those from before its own."""
        self.received = None
        self._trainer = trainer
        # Private, because a strategy for one device does not tell its environment.
        environment: Any = trainer._accelerator_connector.cluster_environment
        if isinstance(environment, SLURMEnvironment) and environment.auto_requeue:
            self.requeue_signal = environment.requeue_signal
        signals = {signal.SIGTERM, signal.SIGINT, self.requeue_signal} - {None}
        self._before = stopping.listen(self._remember, signals)  # type: ignore[arg-type]

    def rest(self) -> None:
        """Training is over and saved: from here on a signal ends the run at once."""
        stopping.restore(self._before)

    def _remember(self, number: int) -> None:
        if number == signal.SIGINT and self.received == signal.SIGINT:
            raise stopping.Stopped(number)
        first = self.received is None
        # The requeue signal comes first, SIGTERM once more with the end of the job.
        if self.received != self.requeue_signal or self.received is None:
            self.received = number
        trainer = self._trainer
        if trainer is not None and trainer.world_size == 1 and unchanged(trainer.lightning_module):
            raise Preempted(self.number)
        if first and number == signal.SIGINT:
            rank_zero_info("stops after this batch and saves; press Ctrl-C again to stop at once without saving")

    def made(self, trainer: Trainer) -> bool:
        """Whether any process was asked; all of them learn of it at the same batch."""
        asked = self.received is not None or trainer.received_sigterm
        if trainer.world_size == 1:
            return asked
        return trainer.strategy.reduce_boolean_decision(asked, all=False)

    def leave(self, trainer: Trainer, saved: str) -> None:
        """Have SLURM start the job again if it was its signal that came, and end.

        Raises:
            Preempted: in any case.
        """
        step = trainer.global_step
        rank_zero_info(f"asked to stop: optimizer step {step} is in {saved}; go on with --ckpt_path last")
        self.requeue(trainer)
        trainer.strategy.barrier()  # srun ends all processes with the first that leaves
        raise Preempted(self.number)

    def requeue(self, trainer: Trainer) -> None:
        """Have SLURM start the job again if it was its signal that came."""
        if trainer.is_global_zero and self.received is not None and self.received == self.requeue_signal:
            _requeue()

    @property
    def number(self) -> int:
        """The signal that the exit status speaks of: SIGTERM, but for a Ctrl-C."""
        return signal.SIGINT if self.received == signal.SIGINT else signal.SIGTERM


def unchanged(module: Any) -> bool:
    """Whether the module is at work that changes nothing of a checkpoint but the state of random generators."""
    return bool(getattr(module, "unchanged", False))


def _requeue() -> None:
    array, job = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_JOB_ID", "")
    name = f"{array}_{os.environ.get('SLURM_ARRAY_TASK_ID')}" if array else job
    try:
        subprocess.run(["scontrol", "requeue", name], check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        told = getattr(error, "stderr", "") or str(error)
        rank_zero_warn(f"SLURM did not requeue job {name!r} ({told.strip()}): submit it again with --ckpt_path last")
