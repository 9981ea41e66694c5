"""Tokenised once and cached: examples in an Arrow file, memory-mapped, under a key of everything they depend on."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset, Features, List, Value
from datasets.arrow_writer import ArrowWriter
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from lit_align.data.rows import BadField, BadRow, Row, Tally
from lit_align.data.source import OnBadRow, Source
from lit_align.types import Example, Segment

# Part of the key: raise it when the same rows would be tokenised differently.
VERSION = 1

FEATURES = Features(
    {
        "trunk": List(Value("int32")),
        "trunk_scored": List(Value("bool")),
        "branches": List(List(Value("int32"))),
        "branches_scored": List(List(Value("bool"))),
        "ranks": List(Value("float64")),
        "margins": List(Value("float64")),
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
    """

    example: Example
    ranks: list[float]
    margins: list[float]
    group: str
    row: Row


Encode = Callable[[Row, Tally], Iterable[Item]]


class Store:
    """The items of one source.

    Attributes:
        tally: what happened to the rows.
        fingerprint: the key, for the run's manifest.
    """

    def __init__(self, data: Dataset, tally: Tally, fingerprint: str) -> None:
        self.data = data
        self.tally = tally
        self.fingerprint = fingerprint

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Item:
        record = self.data[index]
        branches = [Segment(t, s) for t, s in zip(record["branches"], record["branches_scored"], strict=True)]
        example = Example(Segment(record["trunk"], record["trunk_scored"]), branches)
        return Item(example, record["ranks"], record["margins"], record["group"], json.loads(record["row"]))

    def groups(self) -> list[str]:
        """Group of every item."""
        return list(self.data["group"])


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
    folder = _writable(cache_dir) if cache_dir is not None and origin is not None else None
    if folder is None:
        with tempfile.TemporaryDirectory(prefix="lit_align-") as temporary:
            path = Path(temporary) / "items.arrow"
            tally = _write(path, source, encode, on_bad_row)
            return Store(Dataset.from_file(str(path), in_memory=True), tally, key)
    path = folder / f"{key}.arrow"
    if not path.exists():
        # Written beside its place and moved there whole; two processes racing write the same bytes.
        partial = folder / f"{key}.{os.getpid()}.partial"
        tally = _write(partial, source, encode, on_bad_row)
        path.with_suffix(".json").write_text(json.dumps({"tally": dict(tally), "first": tally.first_skipped}))
        partial.replace(path)
    told = json.loads(path.with_suffix(".json").read_text())
    tally = Tally()
    tally.update(told["tally"])
    tally.first_skipped = told["first"]
    return Store(Dataset.from_file(str(path)), tally, key)


def _writable(folder: Path) -> Path | None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        warnings.warn(
            f"cannot write to the cache {folder} ({error}): data is tokenised anew in every run", stacklevel=2
        )
        return None


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
