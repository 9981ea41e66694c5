"""Rows of Python objects: data sets, lists, tables, functions that yield rows."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from lit_align.data.rows import Row, Rows


class GivenRows(Rows):
    """Rows of an object that was given from Python.

    Args:
        name: how messages call it.
        rows: called each time the rows are read.
        fingerprint: of the rows; null where nothing tells whether they have changed, and nothing is cached.
    """

    def __init__(self, name: str, rows: Callable[[], Iterator[Row]], fingerprint: str | None = None) -> None:
        self.name = name
        self.rows = rows
        self.fingerprint = fingerprint

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows())


def given_rows(given: Any, split: str = "train") -> Rows:
    """Rows of an object.

    Args:
        given: `Rows`; a data set of `datasets`, or several by split; a list of dictionaries; a pandas, polars or
            pyarrow table; a function that yields rows; anything else that can be read more than once.
        split: of several by split.

    Raises:
        ValueError: no such split.
        TypeError: nothing of these; says what to give.
    """
    if isinstance(given, Rows):
        return given
    kind = type(given).__name__
    if isinstance(given, (str, bytes)):
        raise TypeError(f"rows={given!r:.60} is a text: give a file as path=, a data set of the hub as hub=")
    if isinstance(given, Mapping):  # datasets.DatasetDict is one
        if split not in given:
            raise ValueError(f"rows ({kind}) has no split {split!r}: set split to one of {', '.join(map(str, given))}")
        return given_rows(given[split], split)
    if type(given).__module__.startswith("datasets."):
        return GivenRows(kind, lambda: iter(given), getattr(given, "_fingerprint", None))  # as `Source.hub` has it
    if hasattr(given, "to_pandas") and hasattr(given, "to_arrow"):  # polars
        given = given.to_arrow()
    if type(given).__module__.partition(".")[0] == "pandas":
        import pyarrow

        given = pyarrow.Table.from_pandas(given, preserve_index=False)
    if hasattr(given, "to_batches"):
        return GivenRows(kind, lambda: (row for batch in given.to_batches(1024) for row in batch.to_pylist()))
    if isinstance(given, (list, tuple)):
        return GivenRows(kind, lambda: iter(given), _hash(given))
    if callable(given) and not hasattr(given, "__getitem__"):
        return GivenRows(getattr(given, "__name__", kind), given)
    if hasattr(given, "__next__"):
        raise TypeError(
            f"rows is a {kind}, which can be read once: give the function that makes it, without calling it"
        )
    if hasattr(given, "__iter__"):
        return GivenRows(kind, lambda: iter(given))
    if hasattr(given, "__getitem__") and hasattr(given, "__len__"):
        return GivenRows(kind, lambda: (given[i] for i in range(len(given))))
    raise TypeError(f"rows is {kind}: give a data set, a list of dictionaries, a table, or a function that yields rows")


def _hash(rows: Sequence[Any]) -> str | None:
    """A hash of rows; None where they are not JSON."""
    digest = hashlib.sha256()
    try:
        for row in rows:
            digest.update(json.dumps(row, sort_keys=True).encode() + b"\n")
    except (TypeError, ValueError, RecursionError):
        return None
    return digest.hexdigest()
