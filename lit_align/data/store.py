"""Tokenised once and cached: examples in an Arrow file, memory-mapped, under a key of everything they depend on.

Beside `key.arrow` lies `key.json`: what happened to the rows, how long the Arrow file must be, and the checksums of
both, which are compared once, when the file is opened. A pair that is not whole (a crash, a full disk, an old version),
or not what was written, is made anew.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import weakref
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow
import pyarrow.compute as pc
from datasets import Dataset, Features, List, Value
from datasets.arrow_writer import ArrowWriter
from lightning.fabric.utilities.rank_zero import rank_zero_info
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from lit_align.data.rows import BadField, BadRow, Row, Tally
from lit_align.data.source import OnBadRow, Source, expand
from lit_align.types import Example, Segment
from lit_align.utils.cache_folder import cache_folder, can_keep
from lit_align.utils.disk import checksum, replacing

# Part of the key: raise it when the same rows would be tokenised differently.
VERSION = 7

FEATURES = Features(
    {
        "trunk": List(Value("int32")),
        "trunk_scored": List(Value("bool")),
        "branches": List(List(Value("int32"))),
        "branches_scored": List(List(Value("bool"))),
        "ranks": List(Value("float64")),
        "margins": List(Value("float64")),
        "shares": List(Value("float64")),
        "scores": List(Value("float64")),
        "group": Value("string"),
        "row": Value("string"),
    }
)


class Item(NamedTuple):
    """An example with what the methods need beside its tokens.

    Attributes:
        example: tokens.
        ranks: of its branches, lower is better; empty where there is nothing to rank.
        margins: how much better each branch is.
        group: a hash of the prompt; items of one group never lie on both sides of a validation split.
        row: the row it came from, for rewards; empty where it is not kept.
        shares: of people who prefer the first of every two branches (12, 13, ... 23, ...); empty for ranks alone.
        grades: of its branches, by the annotator, higher is better; empty where there are none. Rows call them scores.
        mismatched: its trunk with the branches of another item; made where it is needed, and never stored.
    """

    example: Example
    ranks: list[float]
    margins: list[float]
    group: str
    row: Row
    shares: Sequence[float] = ()
    grades: Sequence[float] = ()
    mismatched: Example | None = None


Encode = Callable[[Row, Tally], Iterable[Item]]


class Store:
    """The items of one source.

    Attributes:
        tally: what happened to the rows.
        fingerprint: the key, for the run's manifest.
        origin: fingerprint of the source alone, whatever its rows were tokenised with; None where it has none.
    """

    origin: str | None = None

    def __init__(self, data: Dataset, tally: Tally, fingerprint: str) -> None:
        self.data = data
        self.tally = tally
        self.fingerprint = fingerprint

    def described(self) -> dict[str, Any]:
        """For the run's manifest."""
        told = {"fingerprint": self.fingerprint, "origin": self.origin, "counts": dict(self.tally)}
        return {**told, "languages": dict(self.tally.languages)}

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Item:
        record = self.data[index]
        branches = [Segment(t, s) for t, s in zip(record["branches"], record["branches_scored"], strict=True)]
        example = Example(Segment(record["trunk"], record["trunk_scored"]), branches)
        row, more = json.loads(record["row"]), (record["shares"], record["scores"])
        return Item(example, record["ranks"], record["margins"], record["group"], row, *more)

    def lengths(self, share_prefix: bool = True) -> np.ndarray:
        """Tokens that the model computes for every item, the prompt once or once for each answer.

        Of the memory-mapped columns only the offsets are read, a chunk at a time.
        """
        trunk = pc.list_value_length(self.data.data.column("trunk")).to_numpy()
        chunks = self.data.data.column("branches").chunks
        answers, in_answers = np.concatenate([np.empty((2, 0), int), *map(_answers, chunks)], axis=1)
        return trunk * (1 if share_prefix else np.maximum(answers, 1)) + in_answers

    def longest_sequence(self) -> int:
        """Tokens of the longest sequence: a trunk with one of its answers."""
        longest = 0
        columns = (self.data.data.column(name).chunks for name in ("trunk", "branches"))
        for trunk, branches in zip(*columns, strict=True):
            tokens = pc.list_value_length(trunk).to_numpy(zero_copy_only=False)
            answers = pc.list_value_length(pc.list_flatten(branches)).to_numpy(zero_copy_only=False)
            most = np.zeros(len(tokens), int)
            np.maximum.at(most, pc.list_parent_indices(branches).to_numpy(), answers)
            longest = max(longest, int((tokens + most).max(initial=0)))
        return longest

    def largest_token(self) -> int:
        """The largest token id; -1 where there are none."""
        flat = [pc.list_flatten(chunk) for chunk in self.data.data.column("trunk").chunks]
        flat += [pc.list_flatten(pc.list_flatten(chunk)) for chunk in self.data.data.column("branches").chunks]
        return max((pc.max(tokens).as_py() for tokens in flat if len(tokens)), default=-1)

    def num_answers(self) -> np.ndarray:
        """Branches of every item. Shape (items,)."""
        return pc.list_value_length(self.data.data.column("branches")).to_numpy()

    def groups(self) -> list[str]:
        """Group of every item."""
        return list(self.data["group"])


def _answers(branches: pyarrow.ListArray) -> np.ndarray:
    """How many answers every item has, and how many tokens in them. Shape (2, items)."""
    answers = pc.list_value_length(branches).to_numpy(zero_copy_only=False)
    tokens = pc.list_value_length(pc.list_flatten(branches)).to_numpy(zero_copy_only=False)
    in_answers = np.bincount(pc.list_parent_indices(branches).to_numpy(), tokens, minlength=len(branches))
    return np.stack([answers, in_answers.astype(int)])


def build(source: Source, encode: Encode, options: str, on_bad_row: OnBadRow, cache_dir: Path | None) -> Store:
    """Tokenise a source, or find it tokenised.

    Args:
        source: where rows come from.
        encode: a row to its items.
        options: everything that `encode` depends on, as text: part of the key.
        on_bad_row: stop at a bad row, or count it and go on.
        cache_dir: null keeps the items in a temporary file.
    """
    origin = source.fingerprint()
    key = hashlib.sha256(f"{VERSION} {origin} {options} {on_bad_row}".encode()).hexdigest()[:32]
    if cache_dir is not None and origin is not None and can_keep(cache_dir, "data is tokenised anew in every run"):
        path = cache_dir / f"{key}.arrow"
        stored = _read(path, key)
        if stored is None:
            _write_cached(path, source, encode, on_bad_row)
            stored = _read(path, key)
        if stored is not None:
            stored.origin = origin
            return stored
    # Memory-mapped, so that rows do not fill the memory; the folder goes with the store, or with the process.
    folder = Path(tempfile.mkdtemp(prefix="lit_align-"))
    try:
        tally = _write(folder / "items.arrow", source, encode, on_bad_row)
        if origin is None:  # of such rows nothing is known but what came out
            with (folder / "items.arrow").open("rb") as written:
                key = hashlib.file_digest(written, "sha256").hexdigest()[:32]
        store = Store(Dataset.from_file(str(folder / "items.arrow")), tally, key)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    weakref.finalize(store, shutil.rmtree, folder, ignore_errors=True)
    store.origin = origin
    return store


def _read(path: Path, key: str) -> Store | None:
    """What the cache holds; None unless it is whole, and what was written."""
    try:
        told = json.loads(path.with_suffix(".json").read_text())
        if "checksum" not in told or told["bytes"] != path.stat().st_size:
            return None  # torn, or of an earlier version
        written = told.pop("checksum")
        if written != [checksum(path), _crc(told)]:
            rank_zero_info(f"the cached rows {path} have changed on disk since they were written: they are made anew")
            return None
        tally = Tally()
        tally.update(told["tally"])
        tally.first_skipped = told["first"]
        tally.languages.update(told["languages"])
        tally.columns, tally.used = set(told["columns"]), set(told["used"])
        data = Dataset.from_file(str(path))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, pyarrow.ArrowException):
        return None
    return Store(data, tally, key) if len(data) == tally["examples"] and data.features == FEATURES else None


def _write_cached(path: Path, source: Source, encode: Encode, on_bad_row: OnBadRow) -> None:
    """Write both files, the items last; processes that race write the same bytes."""
    with replacing(path, racing=True) as items:
        tally = _write(items, source, encode, on_bad_row)
        counts: dict[str, Any] = {
            "tally": dict(tally),
            "first": tally.first_skipped,
            "languages": tally.languages,
            "columns": sorted(tally.columns),
            "used": sorted(tally.used),
            "bytes": items.stat().st_size,
        }
        counts["checksum"] = [checksum(items), _crc(counts)]
        with replacing(path.with_suffix(".json"), racing=True) as told:
            told.write_text(json.dumps(counts))


def _crc(counts: dict[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(counts, sort_keys=True).encode()):08x}"


def items_folder(given: str | None) -> Path | None:
    """Where tokenised data is kept: what is given, "none" for nowhere, or the user's cache folder."""
    if given == "none":
        return None
    return cache_folder("data") if given is None else Path(expand(given))


def _write(path: Path, source: Source, encode: Encode, on_bad_row: OnBadRow) -> Tally:
    tally = Tally()
    with ArrowWriter(features=FEATURES, path=str(path), writer_batch_size=1000) as writer:
        for item in tqdm(_items(source, encode, on_bad_row, tally), f"tokenising {source.name}", delay=2, leave=False):
            writer.write(_record(item))
            tally["examples"] += 1
        writer.finalize()
    return tally


def _items(source: Source, encode: Encode, on_bad_row: OnBadRow, tally: Tally) -> Iterator[Item]:
    for where, row in source.read(on_bad_row, tally):
        try:
            yield from encode(row, tally)
        except BadField as problem:
            origin, _, number = where.rpartition(", row ")
            error = BadRow(origin, number, problem)
            if on_bad_row == "error":
                raise error from None
            tally.skip(error)


def _record(item: Item) -> dict[str, Any]:
    trunk, branches = item.example
    return {
        "trunk": trunk.tokens,
        "trunk_scored": trunk.scored,
        "branches": [branch.tokens for branch in branches],
        "branches_scored": [branch.scored for branch in branches],
        "ranks": item.ranks,
        "margins": item.margins,
        "shares": item.shares,
        "scores": item.grades,
        "group": item.group,
        "row": json.dumps(item.row, default=str),
    }


def tokenizer_key(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of a tokenizer: vocabulary, rules, special tokens and chat template."""
    rules = (
        tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    )
    text = json.dumps([rules, tokenizer.chat_template, {k: str(v) for k, v in tokenizer.special_tokens_map.items()}])
    return hashlib.sha256(text.encode()).hexdigest()
