"""metrics.csv without what a clock decides: the rest of two runs of one configuration is equal, byte by byte."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from lit_align.callbacks.throughput import TIMED


def steady(path: Path) -> str:
    """The text of the file without the columns of `TIMED`."""
    rows = list(csv.reader(io.StringIO(path.read_text())))
    kept = [i for i, name in enumerate(rows[0]) if name not in TIMED]
    return "".join(",".join(row[i] for i in kept) + "\n" for row in rows)
