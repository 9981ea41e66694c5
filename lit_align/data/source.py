"""A data source: a hub data set, files, or a Python object, read into the row schema."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from lit_align.data.files import expand, open_files, read_bytes, read_rows
from lit_align.data.formats import FORMATS, PREFERENCES, among_preferences, recognise
from lit_align.data.python_rows import GivenRows, given_rows
from lit_align.data.rows import BadField, BadRow, Row, Rows, Tally, missing
from lit_align.data.saved import files_of, is_saved, load_hub, load_saved
from lit_align.data.watched import watch
from lit_align.utils.display import printable
from lit_align.utils.secret import redact_text

OnBadRow = Literal["error", "skip"]


@dataclass
class Source:
    """Where rows come from. Exactly one of `path`, `hub` and `rows` is set.

    Attributes:
        path: a file, a glob, or an archive member (`zip://*.csv::file.zip`) of json, jsonl, csv, parquet or txt,
            compressed or not; or a folder of such files; or a folder written by `save_to_disk` of `datasets`.
            Environment variables are filled in.
        hub: name of a data set on the Hugging Face hub.
        rows: an object that yields rows, by class_path. In Python also a data set of `datasets`, a list of
            dictionaries, a table of pandas or pyarrow, or a generator function.
        format: name of a reader in `data/formats.py`; auto recognises it by the columns.
        columns: maps the reader's column names to those of the file.
        header: column names of a csv file without a header line.
        split: split of a hub data set or of a saved one, also in part: `train[:10%]`.
        subset: subset (configuration) of a hub data set.
        revision: branch, tag or commit of a hub data set.
        streaming: read a hub data set row by row, without a copy on disk. Tokenised rows are on disk in any case,
            memory-mapped.
        limit: read only the first `limit` rows.
        weight: share of the epoch that this source provides, relative to the other weights; null for every row once.
            A weight that changes during training is a list of pairs (begin, weight), 0 before the first. A begin below
            1 is a share of training, any other an optimizer step: `[[0, 1.0], [0.9, 0.2]]` drops to 0.2 for the last
            tenth.
        label: name of this source in metrics and reports; null for the name of its file, data set or class.
    """

    path: str | None = None
    hub: str | None = None
    rows: Rows | None = None
    format: str = "auto"
    columns: dict[str, str] = field(default_factory=dict)
    header: list[str] | None = None
    split: str = "train"
    subset: str | None = None
    limit: int | None = None
    weight: float | list[tuple[float, float]] | None = None
    label: str | None = None
    revision: str | None = None
    streaming: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.path, os.PathLike):  # from Python
            self.path = os.fspath(self.path)
        if self.path is not None and not isinstance(self.path, str) and self.rows is None:
            self.path, self.rows = None, self.path  # an object in the first place
        if self.rows is not None:
            self.rows = given_rows(self.rows, self.split)
        if self.hub is not None and is_saved(self.hub):
            self.hub, self.path = None, self.hub  # a folder here, that `load_dataset` does not read
        if (self.streaming or self.revision) and self.hub is None:
            raise ValueError("revision and streaming are of data sets of the hub; files are read row by row anyway")
        if sum(given is not None for given in (self.path, self.hub, self.rows)) != 1:
            raise ValueError("a source needs exactly one of path (a file), hub (a data set's name) and rows (a class)")
        if self.format != "auto" and self.format not in FORMATS:
            raise ValueError(f"unknown format {self.format!r}: choose auto or one of {', '.join(FORMATS)}")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit must be at least 1, or null for all rows, got {self.limit}")
        if isinstance(self.weight, list):
            begins = [begin for begin, _ in self.weight]
            if not begins or min(begins) < 0 or any(a >= b for a, b in itertools.pairwise(begins)):
                raise ValueError(f"the weight of {self.name}: begins must ascend from 0 or more, got {self.weight}")

    @property
    def name(self) -> str:
        """Name of the source in messages."""
        given = self.rows.name if isinstance(self.rows, GivenRows) else type(self.rows).__name__
        return redact_text(self.path) if self.path else self.hub or given

    @property
    def short_name(self) -> str:
        """Name of the source in metrics: without folders, endings and slashes."""
        return printable(self.label or self.name.rstrip("/").rsplit("/", 1)[-1].split(".", 1)[0] or self.name)

    def read(self, on_bad_row: OnBadRow, tally: Tally, keep: Sequence[str] = ()) -> Iterator[tuple[str, Row]]:
        """Yield (place in the file, row of the schema).

        Args:
            on_bad_row: raise an error, or skip and count.
            tally: receives the counts of rows.
            keep: columns of the file that each row keeps, whatever its format; a row without one is bad.

        Raises:
            BadRow: a row does not fit, and on_bad_row is error.
            BadFile: a file cannot be read to its end.
            ValueError: the file, data set or environment variable does not exist, or the source holds no rows.
        """
        reader, kind = None if self.format == "auto" else FORMATS[self.format], None
        for origin, number, raw in self._raw(on_bad_row, tally):
            tally["rows"] += 1
            try:
                row = self._rename(raw)
                watched = watch(row, tally)
                if reader is None:
                    kind = recognise(row)
                    reader = FORMATS[kind]
                held = (reader if kind not in PREFERENCES else FORMATS[among_preferences(row, kind)])(watched)
                if not held:  # for example, a conversation tree without rankings
                    tally["rows_with_nothing_to_learn"] += 1
                if absent := [name for name in keep if name not in raw]:
                    raise BadField(absent[0], missing(raw))
                for read in held:
                    yield f"{origin}, row {number}", {**read, **{name: raw[name] for name in keep}}
            except BadField as problem:
                error = BadRow(origin, number, self._as_in_file(problem))
                if on_bad_row == "error":
                    raise error from None
                tally.skip(error)
        if not tally["rows"]:
            raise ValueError(f"{self.name!r} holds no rows")

    def _rename(self, raw: Row) -> Row:
        if not self.columns:
            return raw
        absent = [name for name in self.columns.values() if name not in raw]
        if absent:
            raise BadField(absent[0], missing(raw))
        # A mapped column wins over a column of the file that already has the reader's name.
        kept = {name: value for name, value in raw.items() if name not in self.columns.values()}
        return kept | {ours: raw[theirs] for ours, theirs in self.columns.items()}

    def _as_in_file(self, problem: BadField) -> BadField:
        """Name the field as the file does."""
        theirs, inside = re.fullmatch(r"([^.\[]*)(.*)", problem.field, re.DOTALL).groups()  # type: ignore[union-attr]
        return BadField(self.columns.get(theirs, theirs) + inside, problem.problem)

    def _raw(self, on_bad_row: OnBadRow, tally: Tally) -> Iterator[tuple[str, int, Row]]:
        count = 0
        for origin, number, row in self._everything():
            if self.limit is not None and count >= self.limit:
                return
            count += 1
            if isinstance(row, BadRow):
                if on_bad_row == "error":
                    raise row
                tally["rows"] += 1
                tally.skip(row)
                continue
            yield origin, number, row

    def _everything(self) -> Iterator[tuple[str, int, Row | BadRow]]:
        if self.path is not None and (folder := self._folder) is not None and is_saved(folder):
            for number, row in enumerate(load_saved(folder, self.split), start=1):
                yield self.name, number, row
        elif self.path is not None:
            for path in self._paths():
                for name, handle in open_files(path):
                    for number, row in read_rows(name, handle, self.header):
                        yield name, number, row
        elif self.hub is not None:
            for number, row in enumerate(self._load_hub(), start=1):
                yield self.hub, number, row
        else:
            assert self.rows is not None
            for number, row in enumerate(self.rows, start=1):
                fits = isinstance(row, dict)
                yield self.name, number, row if fits else BadRow(self.name, number, f"is {row!r:.40}, expected a dict")

    @property
    def _folder(self) -> str | None:
        """The path if it is a folder; else None."""
        folder = expand(self.path or "")
        return folder if os.path.isdir(folder) else None

    def _paths(self) -> list[str]:
        """The path itself, or the paths of the files in the folder."""
        assert self.path is not None
        return [self.path] if self._folder is None else files_of(self._folder, self.split)

    def _load_hub(self) -> Any:
        return load_hub(str(self.hub), self.subset, self.split, self.revision, self.streaming)

    @property
    def cacheable(self) -> bool:
        """True if the source has a fingerprint. A stream has one only with a pinned revision."""
        if self.hub is not None and self.streaming:
            return self.revision is not None
        return self.rows is None or self.rows.fingerprint is not None

    def fingerprint(self) -> str | None:
        """Hash that changes whenever the rows change; None if unknown, and then nothing is cached."""
        if not self.cacheable:
            return None
        options = {k: v for k, v in vars(replace(self, weight=None)).items() if k not in ("rows", "label")}
        digest = hashlib.sha256(json.dumps(options, sort_keys=True).encode())
        if self.path is not None and (folder := self._folder) is not None and is_saved(folder):
            digest.update(str(load_saved(folder, self.split)._fingerprint).encode())
        elif self.path is not None:
            for block in itertools.chain.from_iterable(map(read_bytes, self._paths())):
                digest.update(block)
        elif self.rows is not None:
            kind = type(self.rows)
            digest.update(f"{kind.__module__}.{kind.__qualname__} {self.rows.fingerprint}".encode())
        elif not self.streaming:
            digest.update(str(self._load_hub()._fingerprint).encode())
        return digest.hexdigest()


# Endings of files that `read_rows` reads, and of archives.
_FILES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".txt", ".gz", ".bz2", ".xz", ".zst", ".zip")


def keys_of(text: str) -> dict[str, str]:
    """Keys of a source that is given as text: `path` for a file, `hub` for a name on the hub.

    The text is a path if the file or folder exists, or if it looks like one: by its ending, a wildcard, a leading `./`,
    `/`, `~` or `$`, a protocol, or a first folder that exists. Otherwise `owner/name` is a data set on the hub.

    Raises:
        ValueError: the text is neither; says what to write.
    """
    first = text.partition("/")[0]
    is_path = (
        text.startswith((".", "/", "~", "$"))
        or text.lower().endswith(_FILES)
        or any(mark in text for mark in ("*", "?", "::", "://"))
        or os.path.exists(text)
        or os.path.isdir(first)
    )
    if is_path:
        return {"path": text}
    if re.fullmatch(r"[\w.-]+/[\w.-]+", text):
        return {"hub": text}
    raise ValueError(
        f"{text!r} is neither a file nor a data set of the hub (owner/name): write {{path: FILE}} or {{hub: NAME}}"
    )


def as_source(given: Source | str | os.PathLike[str]) -> Source:
    """Make a source from a source, from the name of a file or data set, or from an object that holds rows.

    Raises:
        TypeError: the argument is none of these.
        ValueError: the text names neither a file nor a data set; see `keys_of`.
    """
    if isinstance(given, Source):
        return given
    if isinstance(given, str):
        return Source(**keys_of(given))  # type: ignore[arg-type]
    if type(given) is dict:
        raise TypeError(f"expected a Source, got a dictionary ({given!r:.60}): rows are given as Source(rows=[...])")
    try:
        return Source(given)  # type: ignore[arg-type]
    except TypeError as error:
        raise TypeError(f"expected a Source, or the name of a file or data set, got {given!r:.80}: {error}") from error


def as_sources(given: Any) -> list[Source] | None:
    """Make a list of sources from a list or from one; see `as_source`. None stays None."""
    if given is None:
        return None
    return [as_source(one) for one in (given if isinstance(given, (list, tuple)) else [given])]


def labels(sources: Sequence[Source]) -> list[str]:
    """A unique short name for each source: the second `train` becomes `train-2`."""
    names: list[str] = []
    for source in sources:
        name, number = source.short_name, 2
        while name in names:
            name, number = f"{source.short_name}-{number}", number + 1
        names.append(name)
    return names


__all__ = ["OnBadRow", "Source", "as_source", "as_sources", "expand", "keys_of", "labels"]
