"""The labels of Ziegler et al. 2019: four continuations of a text, as tokens, of which people chose the best."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator

from transformers import AutoTokenizer

from lit_align.data.files import open_files, read_bytes, read_rows
from lit_align.data.rows import BadField, BadRow, Row, Rows, list_of, number_of


class BestOf(Rows):
    """Rows of {"query", "sample0", "sample1", ..., "best"}, the former lists of token ids, as rankings of text.

    The best answer has rank 0, all others tie. They were cut at a fixed length, so none of them gets a stop token.

    Args:
        path: file, or fsspec's name of one (`hf://datasets/...`).
        tokenizer: hub name or folder of the model whose tokens they are.

    Source: Ziegler et al. 2019, "Fine-Tuning Language Models from Human Preferences"; the files are those that
    `launch.py` of github.com/openai/lm-human-preferences names.
    """

    def __init__(self, path: str, tokenizer: str = "gpt2") -> None:
        self.path = path
        self.tokenizer = tokenizer

    @property
    def fingerprint(self) -> str:  # type: ignore[override]
        """Of the file, and of whose tokens they are."""
        digest = hashlib.sha256(json.dumps(self.tokenizer).encode())
        for block in read_bytes(self.path):
            digest.update(block)
        return digest.hexdigest()

    def __iter__(self) -> Iterator[Row]:
        tokenizer = AutoTokenizer.from_pretrained(self.tokenizer)
        for name, handle in open_files(self.path):
            for number, row in read_rows(name, handle):
                if isinstance(row, BadRow):
                    raise row
                try:
                    query, samples, best = _labels(row)
                except BadField as problem:
                    raise BadRow(name, number, problem) from None
                yield {
                    "prompt": tokenizer.decode(query),
                    "completions": tokenizer.batch_decode(samples),
                    "ranks": [float(i != best) for i in range(len(samples))],
                    "finished": [False] * len(samples),
                }


def _labels(row: Row) -> tuple[list[int], list[list[int]], int]:
    fields = [f"sample{i}" for i in range(len(row)) if f"sample{i}" in row]
    if len(fields) < 2:
        raise BadField("sample0, sample1", "are missing: there is nothing to choose from")
    best = number_of(row, "best")
    if best not in range(len(fields)):
        raise BadField("best", f"is {row['best']!r:.40}, expected one of 0 to {len(fields) - 1}")
    return _ids(row, "query"), [_ids(row, field) for field in fields], int(best)


def _ids(row: Row, field: str) -> list[int]:
    ids = list_of(row, field)
    if not all(isinstance(token, int) and not isinstance(token, bool) and token >= 0 for token in ids):
        raise BadField(field, f"is {ids!r:.40}, expected token ids")
    return ids
