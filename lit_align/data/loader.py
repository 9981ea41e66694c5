"""Batches by number: an endless sequence of them, of which a loader hands out one epoch's worth from a position on."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

Batch = Any


class Position:
    """How many batches training has taken; the whole state of the data."""

    def __init__(self) -> None:
        self.batches = 0


class _Batches(Dataset[Batch]):
    def __init__(self, batch: Callable[[int], Batch]) -> None:
        self.batch = batch

    def __getitem__(self, number: int) -> Batch:
        return self.batch(number)


class Loader:
    """Iterable over batches `position .. position + length`, built by number, in worker processes if asked.

    Not a DataLoader, so Lightning takes it as it is: no sampler is replaced, and resuming in the middle of an epoch
    is a matter of one number.

    Args:
        batch: builds the n-th batch.
        length: batches in an epoch.
        num_workers: worker processes that build batches ahead.
        position: advanced with every batch handed out; None for evaluation, which starts from 0 each time.
    """

    def __init__(
        self, batch: Callable[[int], Batch], length: int, num_workers: int = 0, position: Position | None = None
    ) -> None:
        self.batch = batch
        self.length = length
        self.num_workers = num_workers
        self.position = position

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Batch]:
        start = self.position.batches if self.position else 0
        numbers = range(start, start + self.length)
        # A generator of its own: a DataLoader draws a seed on every pass, by default from the global generator, and a
        # resumed run would then sample other completions than an uninterrupted one.
        loader = DataLoader(
            _Batches(self.batch),
            batch_size=None,
            sampler=numbers,
            num_workers=self.num_workers,
            collate_fn=_same,
            generator=torch.Generator(),
        )
        for number, batch in zip(numbers, _received(loader), strict=True):
            # Before the batch is handed out: a checkpoint written while it is trained on counts it as taken.
            if self.position:
                self.position.batches = number + 1
            yield batch

    # Lightning asks a loader for these before it believes that it can resume in the middle of an epoch. The position
    # itself is saved with the data module, which Lightning restores in every case (loaders only mid-epoch).
    def state_dict(self) -> dict[str, int]:
        """The position."""
        return {"batches": self.position.batches if self.position else 0}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Already restored by the data module."""


def evaluation_batches(count: int, rank: int, world: int, size: int) -> list[range]:
    """A process's part of `count` examples to evaluate, in batches of about `size`, or one more.

    As many batches on every process: a model that is spread over them waits for all at each.
    """
    mine = range(rank, count, world)
    batches = min(math.ceil(math.ceil(count / world) / size), count // world)
    return [mine[n * len(mine) // batches : (n + 1) * len(mine) // batches] for n in range(batches)]


def _received(loader: DataLoader[Batch]) -> Iterator[Batch]:
    """Its batches; a worker that is lost while it hands one over is told as torch tells one lost at other times."""
    try:
        yield from loader
    except (ConnectionError, EOFError) as error:
        if not loader.num_workers or str(error).startswith("Caught"):  # of the data themselves, in a worker too
            raise
        raise RuntimeError(f"DataLoader worker was lost while it handed over a batch: {error!r}") from error


def _same(batch: Batch) -> Batch:
    return batch
