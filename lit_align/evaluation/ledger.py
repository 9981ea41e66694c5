"""Results of long work, a line of a file for each item, so that a stopped evaluation goes on where it was."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from lit_align.utils.display import say


class Ledger:
    """Results by the number of their item.

    The first line tells what the results depend on. A file that depended on something else begins anew, and says so.

    Args:
        path: the file; its folder is made.
        key: what the results depend on: model, data, options.
    """

    def __init__(self, path: Path, key: Mapping[str, Any]) -> None:
        self.path = path
        self.done: dict[int, Any] = {}
        told = json.loads(json.dumps({"lit_align": 1, **key}, default=str))
        lines = _lines(path)
        if lines and lines[0] == told:
            self.done = {line["item"]: _numbers(line["result"]) for line in lines[1:] if "item" in line}
            say(f"going on with {len(self.done):,} results of {path}")
        else:
            if lines:
                first = lines[0] if isinstance(lines[0], dict) else {}
                changed = [name for name in told if first.get(name) != told[name]]
                say(f"{path} holds results of another {', '.join(changed) or 'evaluation'}: begun anew")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(told) + "\n")

    def add(self, results: Mapping[int, Any]) -> None:
        """Write down some results; NaN and infinities come back as NaN."""
        lines = [json.dumps({"item": item, "result": _plain(result)}) + "\n" for item, result in results.items()]
        with self.path.open("a") as file:
            file.write("".join(lines))
            file.flush()
        self.done |= results

    def remaining(self, batches: Iterable[Sequence[int]], what: str, unit: str) -> Iterable[Sequence[int]]:
        """Batches of items that have no result yet, behind a bar with the time left.

        A batch is worked on whole or not at all: results may depend, in their last digits, on who shares a batch.
        """
        every = list(batches)
        left = [batch for batch in every if any(item not in self.done for item in batch)]
        total = sum(map(len, every))
        with tqdm(total=total, initial=total - sum(map(len, left)), desc=what, unit=unit, disable=not left) as bar:
            for batch in left:
                yield batch
                bar.update(len(batch))


def fingerprint(name: str) -> str:
    """A digest of names, sizes and times of a folder's files, which tells whether it has changed; a hub name itself."""
    if not os.path.isdir(name):
        return name
    files = sorted(path for path in Path(name).iterdir() if path.is_file())
    told = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]


def _lines(path: Path) -> list[Any]:
    if not path.exists():
        return []
    lines = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:  # the end of a line that a killed run was writing; what follows was added by the next run
            continue
    return lines


def _plain(result: Any) -> Any:
    if isinstance(result, float):
        return result if math.isfinite(result) else None
    if isinstance(result, (list, tuple)):
        return [_plain(value) for value in result]
    return {key: _plain(value) for key, value in result.items()} if isinstance(result, dict) else result


def _numbers(result: Any) -> Any:
    """Null back to NaN, in lists of numbers."""
    return [math.nan if value is None else _numbers(value) for value in result] if isinstance(result, list) else result
