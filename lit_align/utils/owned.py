"""Recognise files and folders that lit_align wrote. It never removes or replaces anything else.

The folder of a run holds a `manifest.json` that names lit_align, a stage a `stage.json`, a point of a sweep a
`point.json`. An exported model holds a `lit_align.json` that lists its files.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lit_align.utils import limits

# Files that desktops and editors leave in any folder.
_LITTER = {".DS_Store", "Thumbs.db", "desktop.ini"}
# Files that an export of an earlier version, without lit_align.json, may hold beside its model card.
_EXPORTED = re.compile(
    r"(?:adapter_)?config\.json|generation_config\.json|(?:adapter_)?model.*\.safetensors(?:\.index\.json)?|README\.md"
    r"|tokenizer.*|special_tokens_map\.json|added_tokens\.json|vocab\..*|merges\.txt|chat_template\..*|lit_align\.json"
)


def is_ours(folder: Path) -> bool:
    """True if a run, a pipeline, a sweep or one of their parts wrote this folder."""
    packages = _json(folder / "manifest.json").get("packages")
    if isinstance(packages, dict) and "lit_align" in packages:
        return True
    return any("key" in _json(folder / name) for name in ("stage.json", "point.json", "done.json"))


def foreign(folder: Path, names: Iterable[str]) -> list[Path]:
    """Existing files among `names` if the folder is not ours; empty folders do not count."""
    there = [folder / name for name in names if holds_something(folder / name)]
    return [] if not there or is_ours(folder) else there


def not_exported(folder: Path) -> list[str]:
    """Names of the files in a folder that no export wrote; empty if the folder does not exist.

    If the path is a link or a file instead of a folder, its own name is returned.
    """
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        return [folder.name]
    files = [path.relative_to(folder) for path in folder.rglob("*") if not path.is_dir() and path.name not in _LITTER]
    told = _json(folder / "lit_align.json").get("sha256")
    if isinstance(told, dict):
        known = {*told, "lit_align.json", "README.md"}
        return sorted(str(file) for file in files if file.parts[0] not in known)
    if _card_is_ours(folder / "README.md"):
        return sorted(str(file) for file in files if not _EXPORTED.fullmatch(file.parts[0]))
    return sorted(map(str, files))


def check_replaceable(folder: Path) -> None:
    """Refuse to replace a folder that is not an exported model.

    Raises:
        FileExistsError: names the first foreign file, and the way out.
    """
    made = folder.is_dir() and not folder.is_symlink()
    made = made and ("sha256" in _json(folder / "lit_align.json") or _card_is_ours(folder / "README.md"))
    if not made and (files := not_exported(folder)):
        more = f" and {len(files) - 1} more" if len(files) > 1 else ""
        raise FileExistsError(
            f"{folder} holds {files[0]}{more}, which lit-align did not write, and the export would replace the folder: "
            "move it away, or choose another --out"
        )


def free_beside(folder: Path) -> Path:
    """A free name beside a folder, to move its old content to."""
    names = (folder.with_name(f"{folder.name}.replaced-{number}") for number in itertools.count(1))
    return next(path for path in names if not path.exists())


def check_unwritten(folder: Path, names: Iterable[str]) -> None:
    """Refuse to write into a folder that holds files of the user under names that will be written.

    Raises:
        FileExistsError: names the first such file, and the way out.
    """
    if there := foreign(folder, names):
        more = f" (and {', '.join(path.name for path in there[1:])})" if there[1:] else ""
        raise FileExistsError(
            f"{there[0]}{more} was not written by lit-align and would be overwritten: choose another --out, or move it "
            "away"
        )


def check_output(folder: Path, names: Iterable[str], parts: Iterable[str]) -> None:
    """Refuse an output folder of a pipeline or a sweep if writing there would overwrite files of the user.

    Args:
        folder: the output folder.
        names: files that will be written, besides the report.
        parts: folders of the stages, or of the sweep's points.

    Raises:
        FileExistsError: names the file or the part, and the way out.
    """
    check_unwritten(folder, names)
    check_report(folder / "report.html")
    for name in parts:
        if holds_something(folder / name) and not is_ours(folder / name):
            raise FileExistsError(
                f"{folder / name} was not made by lit-align, and the run would write into it: choose another --out, or "
                "move it away"
            )


def check_report(file: Path) -> None:
    """Refuse to replace a page that is not a report of lit_align.

    Raises:
        FileExistsError: names the page, and the way out.
    """
    if not file.exists():
        return
    head = b""
    if limits.kind(file) is None:
        with file.open("rb") as stream:
            head = stream.read(65536)
    if b"lit_align" not in head:
        raise FileExistsError(f"{file} is not a report of lit-align and would be replaced by one: move it away")


def holds_something(path: Path) -> bool:
    """True for a file, a link, and a folder with anything in it but a desktop's litter."""
    if path.is_dir():
        return any(entry.name not in _LITTER for entry in path.iterdir())
    return path.exists() or path.is_symlink()


def _json(file: Path) -> dict[str, Any]:
    try:
        return limits.read_json(file)
    except (OSError, ValueError):
        return {}


def _card_is_ours(card: Path) -> bool:
    """True if a model card carries the tag that exports write."""
    try:
        _, mark, rest = limits.read_text(card).partition("---\n")
    except (OSError, ValueError):
        return False
    return bool(mark) and re.search(r"^- lit_align$", rest.partition("\n---\n")[0], re.MULTILINE) is not None
