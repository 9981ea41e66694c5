"""Record the files that a finished stage read and wrote, and compare them when a pipeline resumes."""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lit_align.models.seal import file_hash

# Size in bytes, time of the last change in nanoseconds, sha256.
Print = list[Any]
Prints = dict[str, Print]

# Files that the pipeline itself writes into the folder of a stage.
_OWN = ("stage.json", "stage.yaml", "done.json")


def print_of(file: Path) -> Print:
    """Size, modification time and hash of a file."""
    told = file.stat()
    return [told.st_size, told.st_mtime_ns, file_hash(file)]


def altered(file: Path, before: Print, thorough: bool = False) -> str | None:
    """Compare a file with its recorded print.

    Args:
        file: the file; it may be gone.
        before: the earlier result of `print_of`.
        thorough: compare the hash even if size and time are equal; a flipped bit changes neither.

    Returns:
        The difference in a few words; None if the file is unchanged.
    """
    size, time, digest = before
    if not file.is_file():
        return "is gone"
    told = file.stat()
    if told.st_size == size and told.st_mtime_ns == time and not thorough:
        return None
    return None if told.st_size == size and file_hash(file) == digest else "has changed"


def outputs(kind: str, folder: Path) -> Prints:
    """Files that later stages may read: the model of a fit, the completions of a predict, all files of a call."""
    if kind == "fit":
        files = sorted(path for path in (folder / "model").rglob("*") if path.name != "README.md")
    elif kind == "predict":
        files = [folder / "completions.jsonl"]
    else:
        files = sorted(path for path in folder.rglob("*") if path.name not in _OWN)
    return {str(file.relative_to(folder)): print_of(file) for file in files if file.is_file()}


def inputs(config: Any, inside: str) -> Prints:
    """Files and models that a configuration names, except those of other stages.

    Args:
        config: configuration of a stage.
        inside: folder of the stages, with a trailing slash.
    """
    found: Prints = {}
    for text in _texts(config):
        if not text.startswith(inside):
            found |= {str(file): print_of(file) for file in _files(text)}
    return found


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            if key not in ("out", "ckpt_path", "dirpath", "default_root_dir", "cache_dir"):
                yield from _texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)
    elif isinstance(value, str):
        yield value


def _files(text: str) -> Iterator[Path]:
    """Files that a path-like text names: a file, the matches of a pattern, or the weights of a model folder."""
    if len(text) > 4096 or "\n" in text:
        return
    path = os.path.expanduser(os.path.expandvars(text))
    if os.path.isfile(path):
        if "/" in text or "." in text:  # ignore a plain word that happens to be a file name
            yield Path(path)
    elif os.path.isdir(path):
        for folder in (Path(path), Path(path, "model")):
            if (folder / "config.json").exists() or (folder / "adapter_config.json").exists():
                yield from sorted(file for file in folder.iterdir() if file.suffix in (".safetensors", ".json"))
                return
    elif any(mark in path for mark in "*?["):
        yield from sorted(Path(name) for name in glob.glob(path, recursive=True) if os.path.isfile(name))


def kind_of(name: str) -> str:
    """Kind of change that a changed file means, as `--resume.allow` names it."""
    return "model" if Path(name).suffix in (".safetensors", ".ckpt") or _of_model(Path(name)) else "data"


def _of_model(file: Path) -> bool:
    beside = file.parent
    return file.suffix == ".json" and ((beside / "config.json").exists() or (beside / "adapter_config.json").exists())


def check(
    what: str,
    folder: Path,
    prints: Mapping[str, Print],
    allow: frozenset[str],
    say: Callable[[str], None],
    again: str,
    thorough: bool = False,
) -> Prints:
    """Compare the files of a finished stage with their prints; report or refuse changes.

    Args:
        what: the stage, as messages name it.
        folder: folder that relative names in `prints` refer to.
        prints: recorded when the stage was done.
        allow: accepted kinds of change.
        say: prints a line.
        again: how to run the stage again, for the error.
        thorough: see `altered`.

    Returns:
        New prints of the files whose change was accepted; files that are gone are left out.

    Raises:
        ValueError: a file has changed or is gone, and its kind is not allowed.
    """
    accepted: Prints = {}
    for name, before in prints.items():
        file = folder / name
        matter = altered(file, before, thorough)
        if matter is None:
            continue
        kind = "model" if name.startswith("model/") else kind_of(str(file))
        if kind not in allow:
            raise ValueError(
                f"{what} is done, but {file} {matter} since then: restore it, {again}, or continue with the change: "
                f"--resume.allow {kind}"
            )
        say(f"{what}: {file} {matter} since it was done; continues with the change (--resume.allow {kind})")
        if file.is_file():
            accepted[name] = print_of(file)
    return accepted
