"""Data sets of the hub, and folders of data: saved by `datasets`, or with a file for each shard and split."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

_ENDINGS = (".json", ".jsonl", ".csv", ".parquet", ".txt")
_PACKED = (".gz", ".bz2", ".xz")
# Words in the names of files and folders that tell a split.
_SPLITS = {"train": "train", "training": "train", "test": "test", "testing": "test", "eval": "test"}
_SPLITS |= {"validation": "validation", "valid": "validation", "val": "validation", "dev": "validation"}


def is_saved(folder: str) -> bool:
    """Whether `datasets` has saved a data set, or several by split, in a folder."""
    return any(os.path.isfile(os.path.join(folder, name)) for name in ("state.json", "dataset_dict.json"))


def load_saved(folder: str, split: str) -> Any:
    """The data set that `save_to_disk` has left in a folder, memory-mapped.

    Args:
        folder: of one data set, or of several by split.
        split: which, as `train` or `train[:10%]`; of a single data set, only a part of it counts.

    Raises:
        ValueError: it cannot be read, or has no such split.
    """
    import datasets  # slow to import

    try:
        held = datasets.load_from_disk(folder)
    except Exception as error:  # a dozen unrelated types
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"cannot load the data set saved in {folder!r}: {reason:.300}") from error
    name = split.partition("[")[0]
    by_split = dict(held) if isinstance(held, dict) else {name: held}
    if not set(re.split(r"\[.*?\]|\+", split)) - {""} <= set(by_split):
        raise ValueError(f"{folder!r} has no split {split!r}: set split to one of {', '.join(by_split)}")
    if split in by_split:
        return by_split[split]
    sizes = {name: len(part) for name, part in by_split.items()}
    try:
        parts = datasets.ReadInstruction.from_spec(split).to_absolute(sizes)
    except (ValueError, AssertionError) as error:
        raise ValueError(f"{folder!r}: split {split!r} cannot be read: {error}") from error
    return datasets.concatenate_datasets([by_split[p.splitname].select(range(p.from_, p.to)) for p in parts])


def files_of(folder: str, split: str) -> list[str]:
    """The data files in a folder and below, those of a split where their names tell one.

    Raises:
        ValueError: there is none, or none of this split.
    """
    if "[" in split or "+" in split:
        raise ValueError(f"{folder!r}: split {split!r} is of data sets that were saved: of files, set limit")
    root = Path(folder)
    found = [path for path in sorted(root.rglob("*")) if path.is_file() and _is_data(path, root)]
    if not found:
        raise ValueError(f"no data file ({', '.join(_ENDINGS)}) lies in the folder {folder!r}")
    splits = {path: _split_of(path.relative_to(root)) for path in found}
    named = set(splits.values()) - {None}
    if not named:
        if split != "train":
            raise ValueError(f"the names of the files in {folder!r} tell no split {split!r}: name the file in path")
        return [str(path) for path in found]
    chosen = [str(path) for path in found if splits[path] == _SPLITS.get(split, split)]
    if not chosen:
        raise ValueError(
            f"{folder!r} has no file of the split {split!r}: set split to one of {', '.join(sorted(map(str, named)))}"
        )
    return chosen


def _is_data(path: Path, root: Path) -> bool:
    name = path.name.lower()
    hidden = any(part.startswith((".", "_")) for part in path.relative_to(root).parts)
    for ending in _PACKED:
        name = name.removesuffix(ending)
    return not hidden and name.endswith(_ENDINGS) and not name.startswith(("readme", "license", "dataset_info"))


def _split_of(path: Path) -> str | None:
    """The split that a path names: by its file's name, or else by a folder's."""
    for part in (path.name, *reversed(path.parts[:-1])):
        for word in re.split(r"[^a-z]+", part.lower()):
            if word in _SPLITS:
                return _SPLITS[word]
    return None


def load_hub(name: str, subset: str | None, split: str, revision: str | None, streaming: bool) -> Any:
    """A data set of the hub.

    Raises:
        ValueError: it cannot be loaded; says why.
    """
    import datasets  # slow to import

    try:
        return datasets.load_dataset(name, subset, split=split, revision=revision, streaming=streaming)
    except Exception as error:  # the hub client raises a dozen unrelated types
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"cannot load data set {name!r} (split {split!r}) from the hub: {reason}") from error
