"""What an exported folder says of itself: of which step it is, and the checksums that its files had.

The file is also the mark of a folder that this program wrote, and may replace.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SEAL = "lit_align.json"
# The card is text for people, who may go on writing it.
_UNSEALED = (SEAL, "README.md")


def file_hash(file: Path) -> str:
    """The sha256 of a file, in hexadecimal digits."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def model_hash(folder: Path) -> str | None:
    """The sha256 of all the weights of a folder; None for what is not a folder with weights."""
    files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    if not files:
        return None
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def write_seal(folder: Path, told: Mapping[str, Any] | None = None) -> None:
    """Write the checksums of a finished folder's files, beside what else is to be known of it."""
    files = {file.name: file_hash(file) for file in sorted(folder.iterdir()) if file.name not in _UNSEALED}
    (folder / SEAL).write_text(json.dumps({**(told or {}), "sha256": files}, indent=2) + "\n")


def read_seal(folder: Path) -> dict[str, Any] | None:
    """What `write_seal` wrote; None for a folder of another origin, or where the file is damaged."""
    try:
        told = json.loads((folder / SEAL).read_text())
    except (OSError, ValueError):
        return None
    return told if isinstance(told, dict) and isinstance(told.get("sha256"), dict) else None


def broken_seal(folder: Path) -> str | None:
    """Compare a folder with its checksums.

    Returns:
        What differs, in a few words, with the way out; None if nothing does, or if there are no checksums.
    """
    told = read_seal(folder)
    for name, expected in sorted((told or {}).get("sha256", {}).items()):
        file = folder / name
        if not file.exists():
            return f"{file} is gone since the export: copy or export the folder again"
        if file_hash(file) != expected:
            return (
                f"{file} has changed since the export: its checksum differs from that in {SEAL}; copy or export the "
                f"folder again, or remove {SEAL} if the change is yours"
            )
    return None
