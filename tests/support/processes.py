"""Jobs in two processes, all of them in one start: importing takes longer than they do.

Run as a program this file is one of the processes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from support.runs import Result, one_step

Jobs = dict[str, dict[str, Any]]


def in_two_processes(jobs: Jobs, folder: Path) -> dict[str, Result]:
    """What `one_step` gives for the arguments of each job, by its name."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    torchrun("2", str(Path(__file__)), str(folder))
    return torch.load(folder / "results.pt")


def torchrun(processes: str, *command: str, **environment: str) -> None:
    """Run a program, or a module after -m, as torchrun does."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes, *command]
    paths = f"{Path(__file__).parents[1]}:{os.environ.get('PYTHONPATH', '')}"
    variables = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(start, env=variables, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    results = {}
    for name, job in json.loads((folder / "jobs.json").read_text()).items():
        results[name] = one_step(**{**job, "rows": Path(job["rows"])}, devices=2)
    if os.environ["RANK"] == "0":
        torch.save(results, folder / "results.pt")
