"""The order of examples: a function of (seed, epoch) and of a position, nothing else."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence

import numpy as np

Ref = tuple[int, int]  # source, item of the source


class Order:
    """An endless stream of examples from several sources, in epochs.

    Without weights every item comes once an epoch. With weights a source provides its share of the epoch's examples
    from a stream of its own, which starts again, newly shuffled, only when all its items have been used.

    Args:
        sources: for each source, the items to use.
        weights: share of each source; null for the number of its items. All or none.
        seed: of the shuffling.
    """

    begins: Sequence[int] = ()  # of phases, where there are any

    def __init__(
        self, sources: Sequence[Sequence[int] | np.ndarray], weights: Sequence[float | None], seed: int
    ) -> None:
        given = [weight for weight in weights if weight is not None]
        if given and len(given) != len(weights):
            raise ValueError("give a weight to every source or to none")
        self.sources = [np.asarray(items, np.int64) for items in sources]
        self.seed = seed
        self.length = sum(map(len, self.sources))
        sizes = [len(items) for items in self.sources]
        if given:
            check_weights(given, sizes)
        self.quotas = apportion(given, self.length) if given else sizes
        self._epochs: dict[int, np.ndarray] = {}  # the last two made: a batch may reach into the next one

    def __len__(self) -> int:
        """Examples in an epoch."""
        return self.length

    def __getitem__(self, n: int) -> Ref:
        """The n-th example of the stream."""
        epoch, position = divmod(n, self.length)
        source, item = self._epoch(epoch)[position]
        return int(source), int(item)

    def _epoch(self, epoch: int) -> np.ndarray:
        if epoch not in self._epochs:
            self._epochs = dict([*self._epochs.items(), (epoch, self._shuffle(epoch))][-2:])
        return self._epochs[epoch]

    def _shuffle(self, epoch: int) -> np.ndarray:
        refs = [
            np.stack([np.full(quota, source), self._draw(source, epoch * quota, quota)], axis=1)
            for source, quota in enumerate(self.quotas)
        ]
        everything = np.concatenate(refs)
        return everything[np.random.default_rng((self.seed, 0, epoch)).permutation(len(everything))]

    def _draw(self, source: int, start: int, count: int) -> np.ndarray:
        """Items start .. start + count of a source's own endless stream of permutations."""
        items, drawn = self.sources[source], []
        while count:
            cycle, at = divmod(start, len(items))
            shuffled = items[np.random.default_rng((self.seed, 1 + source, cycle)).permutation(len(items))]
            drawn.append(shuffled[at : at + count])
            start, count = start + len(drawn[-1]), count - len(drawn[-1])
        return np.concatenate(drawn) if drawn else np.empty(0, np.int64)


def check_weights(weights: Sequence[float], sizes: Sequence[int]) -> None:
    """Refuse weights that make no mixture of sources of these sizes."""
    if any(weight < 0 or not math.isfinite(weight) for weight in weights) or sum(weights) == 0:
        raise ValueError(f"weights must not be negative, and one must be positive: {list(weights)}")
    if any(weight > 0 and not size for weight, size in zip(weights, sizes, strict=True)):
        raise ValueError("a source with a weight has no examples")


def apportion(weights: Sequence[float], total: int) -> list[int]:
    """Whole numbers in proportion to the weights that add up to the total (largest remainders)."""
    shares = [weight / sum(weights) * total for weight in weights]
    quotas = [int(share) for share in shares]
    for i in sorted(range(len(shares)), key=lambda i: quotas[i] - shares[i])[: total - sum(quotas)]:
        quotas[i] += 1
    return quotas


def hold_out(
    sizes: Sequence[int], groups: Callable[[], Sequence[str]], fraction: float
) -> tuple[list[np.ndarray], list[Ref]]:
    """Items of each source to train on, and those to validate on.

    Args:
        sizes: items of each source.
        groups: the group of every item, source after source; not asked for where nothing is held out.
        fraction: share of the groups to hold out; see `split_by_group`.
    """
    source = np.repeat(np.arange(len(sizes)), sizes)
    item = np.concatenate([np.empty(0, int), *map(np.arange, sizes)])
    everything = np.arange(len(item)), np.empty(0, int)
    train, held = (np.asarray(s, int) for s in split_by_group(groups(), fraction)) if fraction else everything
    kept = [item[train[source[train] == s]] for s in range(len(sizes))]
    return kept, [(int(source[n]), int(item[n])) for n in held]


def split_by_group(groups: Sequence[str], fraction: float) -> tuple[list[int], list[int]]:
    """Items for training and for validation: whole groups, so that no prompt is on both sides.

    A group is held out if its hash, a number in [0, 1), is below the fraction. The side of a prompt thus depends on the
    prompt alone: adding rows or sources moves none, and every data module with the same fraction, of instructions,
    preferences or prompts, holds out the same ones. A fraction above 0 holds out at least one group of two or more.
    """
    places = {group: _place(group) for group in groups}
    held_out = {group for group, place in places.items() if place < fraction}
    if fraction > 0 and not held_out and len(places) > 1:
        held_out = {min(places, key=places.__getitem__)}
    train = [i for i, group in enumerate(groups) if group not in held_out]
    return train, [i for i, group in enumerate(groups) if group in held_out]


def _place(group: str) -> float:
    return int.from_bytes(hashlib.sha256(group.encode()).digest()[:6], "big") / 2**48
