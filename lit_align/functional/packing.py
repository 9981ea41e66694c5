"""Lay examples out in rows: best-fit packing, shared prompts, flat lists of what is scored."""

from __future__ import annotations

import bisect
from collections.abc import Sequence

import numpy as np
import torch

from lit_align.types import Example, PackedBatch, Segment


def best_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Put items into as few bins as the best-fit-decreasing rule finds: longest first, each where it fits tightest.

    Args:
        lengths: length of each item.
        capacity: room in a bin.

    Returns:
        Item indices of each bin.

    Raises:
        ValueError: an item longer than the capacity.
    """
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (room left, bin), sorted: the tightest fit is the first that is large enough
    for item in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[item]
        if length > capacity:
            raise ValueError(f"item {item} has length {length}, above the capacity of {capacity}")
        at = bisect.bisect_left(room, (length, -1))
        if at == len(room):
            left, where = capacity, len(bins)
            bins.append([])
        else:
            left, where = room.pop(at)
        bins[where].append(item)
        bisect.insort(room, (left - length, where))
    return bins


def split_bins(bins: Sequence[Sequence[int]], number: int) -> list[list[int]]:
    """Cut bins in two, those with the most items first, until there are as many as asked for.

    Args:
        bins: items of each, none empty.
        number: of bins to have; at most that of items.

    Returns:
        Items of each bin, none empty.
    """
    split = [list(items) for items in bins]
    while len(split) < number:
        fullest = max(split, key=len)
        split.append(fullest[len(fullest) // 2 :])
        del fullest[len(fullest) // 2 :]
    return split


def balance(lengths: Sequence[int], parts: int) -> list[list[int]]:
    """Share items out, equally many to each part, so that no part has much more to do than another.

    Longest first, each to the part that has the least so far and still has room.

    Source: Graham 1969, "Bounds on Multiprocessing Timing Anomalies"; there the counts are left open.

    Args:
        lengths: length of each item; as many as divide evenly.
        parts: how many.

    Returns:
        Item indices of each part, ascending.

    Raises:
        ValueError: the items cannot be shared out equally.
    """
    room, rest = divmod(len(lengths), parts)
    if rest:
        raise ValueError(f"{len(lengths)} items cannot be shared out equally to {parts} parts")
    shares: list[list[int]] = [[] for _ in range(parts)]
    sums = [0] * parts
    for item in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        least = min((part for part in range(parts) if len(shares[part]) < room), key=lambda part: (sums[part], part))
        shares[least].append(item)
        sums[least] += lengths[item]
    return [sorted(share) for share in shares]


def unshare(example: Example) -> list[Example]:
    """The sequences of an example, each alone: trunk and branch in one run of tokens."""
    trunk = example.trunk
    if not example.branches:
        return [example]
    return [
        Example(Segment([*trunk.tokens, *branch.tokens], [*trunk.scored, *branch.scored]))
        for branch in example.branches
    ]


def pack(
    examples: Sequence[Example], row_tokens: int | None = None, share_prefix: bool = True, packing: bool = True
) -> PackedBatch:
    """Build a batch from examples.

    The layout changes the cost and nothing else: losses and gradients are the same for every choice below, to the last
    digits of the precision used.

    Args:
        examples: at least one.
        row_tokens: room in a row; by default the longest example of the batch. A longer example widens the rows.
        share_prefix: compute a prompt once for all its continuations; False repeats it for each.
        packing: put several examples in a row; False gives each its own row (what a padded batch would be).

    Returns:
        The batch; sequences are in the order of the examples and of their branches.

    Raises:
        ValueError: a sequence without tokens, or whose first token is scored; or scored tokens in a trunk with
            branches, where it is open how often they would count.
    """
    if any(example.branches and any(example.trunk.scored) for example in examples):
        raise ValueError("the trunk of an example with branches cannot be scored: its tokens belong to every sequence")
    trees = [tree for example in examples for tree in ([example] if share_prefix else unshare(example))]
    lengths = [tree.num_tokens for tree in trees]
    width = max(row_tokens or 0, *lengths)
    rows = best_fit_decreasing(lengths, width) if packing else [[i] for i in range(len(trees))]
    width = max(sum(lengths[i] for i in row) for row in rows)
    layout = _Layout(len(rows), width)
    place = {tree: (r, sum(lengths[i] for i in row[:at])) for r, row in enumerate(rows) for at, tree in enumerate(row)}
    for index, tree in enumerate(trees):
        layout.add(tree, index, *place[index])
    sequences = [e for e, example in enumerate(examples) for _ in range(max(len(example.branches), 1))]
    return layout.batch(sequences)


class _Layout:
    """Rows being filled."""

    def __init__(self, rows: int, width: int) -> None:
        self.tokens = np.zeros((rows, width), np.int64)
        self.positions = np.zeros((rows, width), np.int64)
        self.tree = np.full((rows, width), -1, np.int64)
        self.branch = np.zeros((rows, width), np.int64)
        self.width = width
        self.source: list[np.ndarray] = []
        self.target: list[np.ndarray] = []
        self.sequence: list[np.ndarray] = []
        self.last: list[int] = []

    def add(self, tree: Example, index: int, row: int, start: int) -> None:
        """Write a tree into a row, from a column on."""
        trunk_length = len(tree.trunk.tokens)
        self._write(tree.trunk, row, start, index, 0, 0)
        if not tree.branches:
            self._score(tree.trunk, row, start, before=None)
        column = start + trunk_length
        for k, branch in enumerate(tree.branches, start=1):
            self._write(branch, row, column, index, k, trunk_length)
            # The first token of a branch is predicted by the last of the trunk, however far away that lies in the row.
            before = row * self.width + start + trunk_length - 1 if trunk_length else None
            self._score(branch, row, column, before)
            column += len(branch.tokens)

    def _write(self, segment: Segment, row: int, start: int, tree: int, branch: int, position: int) -> None:
        n = len(segment.tokens)
        here = slice(start, start + n)
        self.tokens[row, here] = segment.tokens
        self.positions[row, here] = np.arange(position, position + n)
        self.tree[row, here] = tree
        self.branch[row, here] = branch

    def _score(self, segment: Segment, row: int, start: int, before: int | None) -> None:
        """List a sequence's scored tokens; `before` is the state that predicts its first one, if there is any."""
        first = row * self.width + start
        at = np.flatnonzero(np.asarray(segment.scored, bool))
        source = first + at - 1
        if len(at) and at[0] == 0:
            if before is None:
                raise ValueError(
                    "the first token of a sequence cannot be scored: nothing comes before it to predict it"
                )
            source[0] = before
        self.source.append(source)
        self.target.append(np.asarray(segment.tokens, np.int64)[at])
        self.sequence.append(np.full(len(at), len(self.last), np.int64))
        if len(segment.tokens):
            self.last.append(first + len(segment.tokens) - 1)
        elif before is not None:
            # An empty branch ends where its trunk does, and that may lie far away in the row.
            self.last.append(before)
        else:
            raise ValueError("a sequence without tokens cannot be packed: nothing in it could be scored")

    def batch(self, example_of_sequence: list[int]) -> PackedBatch:
        """The rows as tensors."""
        return PackedBatch(
            torch.from_numpy(self.tokens),
            torch.from_numpy(self.positions),
            torch.from_numpy(self.tree),
            torch.from_numpy(self.branch),
            torch.from_numpy(np.concatenate(self.source)),
            torch.from_numpy(np.concatenate(self.target)),
            torch.from_numpy(np.concatenate(self.sequence)),
            torch.tensor(self.last),
            torch.tensor(example_of_sequence),
            torch.zeros(example_of_sequence[-1] + 1, dtype=torch.long),
        )


def unpack(batch: PackedBatch) -> PackedBatch:
    """The same batch with one sequence a row, for models that take no mask of trees.

    Sequences and scored tokens keep their order, so nothing downstream notices.
    """
    tokens, tree, branch = (x.flatten().tolist() for x in (batch.tokens_RN, batch.tree_RN, batch.branch_RN))
    width = batch.tokens_RN.shape[1]
    paths = []  # for each sequence, the flat index of each of its tokens
    for last in batch.last_Q.tolist():
        row = range(last // width * width, last + 1)
        paths.append([i for i in row if tree[i] == tree[last] and branch[i] in (0, branch[last])])
    longest = max(map(len, paths))
    column = {(q, i): c for q, path in enumerate(paths) for c, i in enumerate(path)}
    source = [
        q * longest + column[q, i] for q, i in zip(batch.sequence_S.tolist(), batch.source_S.tolist(), strict=True)
    ]
    rows = [[tokens[i] for i in path] + [0] * (longest - len(path)) for path in paths]
    lengths = torch.tensor([len(path) for path in paths])
    steps = torch.arange(longest).expand(len(paths), -1)
    inside = steps < lengths[:, None]
    return PackedBatch(
        *(
            x.to(batch.tokens_RN.device)
            for x in (
                torch.tensor(rows),
                steps * inside,
                torch.where(inside, torch.arange(len(paths))[:, None], -1),
                torch.zeros(len(paths), longest, dtype=torch.long),
                torch.tensor(source, dtype=torch.long),
                batch.target_S,
                batch.sequence_S,
                torch.arange(len(paths)) * longest + lengths - 1,
                batch.example_Q,
                batch.origin_E,
            )
        )
    )
