"""Asked to stop: SIGTERM, and SLURM's signal before a job's time is up."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from typing import Any

from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.exceptions import SIGTERMException


class Preempted(SIGTERMException):
    """The run was asked to stop, and has saved: the process ends with 143, as one that SIGTERM ended."""

    def __init__(self) -> None:
        super().__init__(128 + signal.SIGTERM)


class StopRequest:
    """Remembers that a signal came, so that the run can stop where a checkpoint is exact.

    Lightning saves from within the handler of SLURM's signal, be it in the middle of a step or of an accumulation of
    gradients, and on SIGTERM it leaves without saving, as a process that succeeded.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self.requeue_signal: int | None = None

    def listen(self, trainer: Trainer) -> None:
        """Take the place of Lightning's handlers, until it restores at the end those from before its own."""
        self.received = None
        environment: Any = trainer._accelerator_connector.cluster_environment
        if isinstance(environment, SLURMEnvironment) and environment.auto_requeue:
            self.requeue_signal = environment.requeue_signal
        if threading.current_thread() is threading.main_thread():
            for number in {signal.SIGTERM, self.requeue_signal} - {None}:
                signal.signal(number, self._remember)  # type: ignore[arg-type]

    def _remember(self, number: int, frame: Any) -> None:
        # The requeue signal comes first, SIGTERM once more with the end of the job.
        if self.received != self.requeue_signal or self.received is None:
            self.received = number

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
        if trainer.is_global_zero and self.received is not None and self.received == self.requeue_signal:
            _requeue()
        trainer.strategy.barrier()  # srun ends all processes with the first that leaves
        raise Preempted


def _requeue() -> None:
    array, job = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_JOB_ID", "")
    name = f"{array}_{os.environ.get('SLURM_ARRAY_TASK_ID')}" if array else job
    try:
        subprocess.run(["scontrol", "requeue", name], check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        told = getattr(error, "stderr", "") or str(error)
        rank_zero_warn(f"SLURM did not requeue job {name!r} ({told.strip()}): submit it again with --ckpt_path last")
