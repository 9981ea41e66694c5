"""One thread a test: two tests at a time on two cores run in half the time, and do not fight over them."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
# No test talks to a network; the hub is told so before anything imports it.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
# Nothing is left in the cache of whoever runs the tests.
os.environ["LIT_ALIGN_CACHE"] = tempfile.mkdtemp(prefix="lit_align-tests-")
atexit.register(shutil.rmtree, os.environ["LIT_ALIGN_CACHE"], ignore_errors=True)

import pytest  # noqa: E402
import torch  # noqa: E402 - after what it reads at import

torch.set_num_threads(1)


def pytest_configure(config: pytest.Config) -> None:
    """Turn deprecations into errors under exact versions; elsewhere a new release must not fail the suite by one."""
    if os.environ.get("LIT_ALIGN_DEPRECATIONS") == "error":
        filters = config.getini("filterwarnings")
        filters[:] = [line for line in filters if not line.startswith("default::")]


@pytest.fixture
def realdata(monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of real data; ${LIT_ALIGN_DATA} stands for it in paths."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("LIT_ALIGN_DATA") or default)
    if not folder.is_dir():
        pytest.skip(f"no real data: {folder} is not there, and LIT_ALIGN_DATA names no other folder")
    monkeypatch.setenv("LIT_ALIGN_DATA", str(folder))
    return folder
