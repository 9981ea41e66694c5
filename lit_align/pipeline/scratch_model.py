"""A pipeline step that creates an untrained model: a tokenizer and a configuration, for training from scratch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lit_align.data.rows import Tally
from lit_align.data.source import Source, as_sources
from lit_align.models.scratch import bpe_tokenizer, write_seed_model


class ScratchModel:
    """Train a byte-level BPE tokenizer and write it together with the configuration of a small Llama.

    `Network(folder, weights="random")` then starts training from random weights.

    Args:
        texts: sources of the text to train the tokenizer on.
        vocab_size: number of tokens, including the 256 bytes and the special tokens.
        hidden_size: width of the hidden states.
        layers: number of layers.
        heads: number of attention heads.
        intermediate_size: width of the feed-forward layers.
        max_positions: longest sequence, in tokens.
        init_std: standard deviation of the random weights.
    """

    def __init__(
        self,
        texts: list[Source],
        vocab_size: int = 4096,
        hidden_size: int = 192,
        layers: int = 4,
        heads: int = 4,
        intermediate_size: int = 512,
        max_positions: int = 1024,
        init_std: float = 0.03,
    ) -> None:
        self.texts = as_sources(texts) or []
        self.vocab_size = vocab_size
        self.shape: dict[str, Any] = {
            "hidden_size": hidden_size,
            "layers": layers,
            "heads": heads,
            "intermediate_size": intermediate_size,
            "max_positions": max_positions,
            "init_std": init_std,
        }

    def run(self, out: Path) -> dict[str, float]:
        """Write the folder `model` inside `out`; return the vocabulary size."""
        tokenizer = bpe_tokenizer(self._strings(), self.vocab_size)
        write_seed_model(tokenizer, out / "model", **self.shape)
        return {"vocabulary": float(len(tokenizer))}

    def _strings(self) -> Iterator[str]:
        for source in self.texts:
            for _, row in source.read("skip", Tally()):
                yield from _texts(row)


def _texts(value: object) -> Iterator[str]:
    """Yield every text in a row, at any depth, except roles."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            if key != "role":
                yield from _texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)
