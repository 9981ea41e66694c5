"""Find the cache folder, and check that it is writable. A cache only holds what can be recomputed."""

from __future__ import annotations

import os
import tempfile
import warnings
from pathlib import Path


def cache_folder(name: str) -> Path:
    """Folder of one kind of cached data: below LIT_ALIGN_CACHE, or below ~/.cache/lit_align."""
    return Path(os.environ.get("LIT_ALIGN_CACHE") or Path.home() / ".cache" / "lit_align") / name


def can_keep(folder: Path, otherwise: str) -> bool:
    """Check that a cache folder is writable; warn if it is not.

    Args:
        folder: the folder; it is created.
        otherwise: what happens without a cache, for the warning.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError as error:
        warnings.warn(f"cannot write to the cache {folder} ({error}): {otherwise}", stacklevel=2)
        return False
