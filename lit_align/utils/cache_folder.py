"""The cache of what can be computed again: where it is, and whether it can be written to."""

from __future__ import annotations

import os
import tempfile
import warnings
from pathlib import Path


def cache_folder(name: str) -> Path:
    """Where a kind of what can be computed again is kept: in LIT_ALIGN_CACHE, or in the cache folder of the user."""
    return Path(os.environ.get("LIT_ALIGN_CACHE") or Path.home() / ".cache" / "lit_align") / name


def can_keep(folder: Path, otherwise: str) -> bool:
    """Whether the cache can be written to, with a warning where it cannot.

    Args:
        folder: made if it is not there.
        otherwise: what happens where nothing is kept.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError as error:
        warnings.warn(f"cannot write to the cache {folder} ({error}): {otherwise}", stacklevel=2)
        return False
