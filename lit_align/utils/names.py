"""Check names that become folders and files: one plain part of a path."""

from __future__ import annotations

import unicodedata
from pathlib import PurePosixPath, PureWindowsPath

# Most file systems allow 255 bytes; leave room for endings such as `-2` and `.partial`.
MAX_BYTES = 200


def check_name(name: object, what: str, taken: tuple[str, ...] = ()) -> str:
    """Refuse a name that is not one plain part of a path.

    Args:
        name: name of a folder or a file.
        what: what messages call it.
        taken: reserved names.

    Raises:
        ValueError: the name is not text, is empty, `.`, `..` or too long, begins with a dot, or holds a slash, a
            backslash, a `$` or an invisible character.
    """
    if not isinstance(name, str):
        raise ValueError(f"{what} is {name!r}, expected text: put it in quotes")
    problem = None
    if not name.strip() or name != name.strip():
        problem = "is empty, or begins or ends with white space"
    elif name.startswith("."):
        problem = "begins with a dot"
    elif any(mark in name for mark in "/\\$"):
        problem = "leads to another folder: it must hold no slash, backslash or $"
    elif unseen(name):
        problem = "holds invisible characters"
    elif len(name.encode(errors="replace")) > MAX_BYTES:
        problem = f"is longer than {MAX_BYTES} bytes"
    elif name in taken:
        problem = "is the name of a file or folder that is written there"
    if problem:
        raise ValueError(f"{what} {name!r:.80} {problem}")
    return name


def check_folder(folder: str, what: str) -> str:
    """Refuse a path that is empty, is the current folder, or contains `..`.

    Args:
        folder: a path from a configuration file; it may be absolute.
        what: what messages call it.

    Raises:
        ValueError: see above, or the path holds invisible characters.
    """
    parts = PureWindowsPath(folder).parts if "\\" in folder else PurePosixPath(folder).parts
    named = [part for part in parts if part.strip("/\\. ")]
    if ".." in parts or unseen(folder) or not named or folder != folder.strip():
        raise ValueError(f"{what} {folder!r:.80} is not a folder to write into: name one, without `..`")
    return folder


def unseen(text: str) -> bool:
    """True if the text holds control, format or unassigned characters, or lone surrogates."""
    return any(unicodedata.category(character) in ("Cc", "Cf", "Cs", "Cn", "Co", "Zl", "Zp") for character in text)
