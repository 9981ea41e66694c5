"""Mixtures of sources whose proportions change in the course of training: phases, as midtraining has them."""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from lit_align.data.order import Order, Ref, check_weights
from lit_align.data.source import Source, labels


class Phase(NamedTuple):
    """A stretch of training with one mixture.

    Attributes:
        begin: number of its first example.
        weights: of each source.
    """

    begin: int
    weights: list[float]


class PhasedOrder(Order):
    """An endless stream of examples from several sources, a mixture for each phase; see `Order`.

    A phase is made in blocks of as many examples as the sources have together; its last may be shorter. Of a block
    every source gets its share, to less than one example; what rounding left it short of in one block it is given in a
    later one. Its examples lie spread out: each in a place of its own, drawn from as many equal stretches. No part of a
    block is then off by much more than an example a source. A source
    goes through all its items, newly shuffled each time, before one comes again, and goes on where it was in the next
    phase.

    Args:
        sources: for each source, the items to use.
        phases: the first begins with example 0, the last has no end.
        seed: of the shuffling.
    """

    def __init__(self, sources: Sequence[Sequence[int] | np.ndarray], phases: Sequence[Phase], seed: int) -> None:
        super().__init__(sources, [None] * len(sources), seed)
        self.phases = list(phases)
        self.begins = [phase.begin for phase in phases]
        for phase in phases:
            check_weights(phase.weights, [len(items) for items in self.sources])
        # Examples of each source: of a phase's first blocks, for each number of them; and before each phase.
        self._whole = [[np.zeros(len(sources), int)] for _ in phases]
        self._drawn = [np.zeros(len(sources), int)]
        for p, end in enumerate(self.begins[1:]):
            full, rest = divmod(end - self.begins[p], self.length)
            self._drawn.append(self._drawn[p] + self._given(p, full) + self._quotas(p, full, rest))
        self._blocks: dict[tuple[int, int], np.ndarray] = {}  # the last two made

    def __getitem__(self, n: int) -> Ref:
        """The n-th example of the stream."""
        phase = bisect.bisect_right(self.begins, n) - 1
        block, at = divmod(n - self.begins[phase], self.length)
        source, item = self._block(phase, block)[at]
        return int(source), int(item)

    def counts(self, phase: int, end: int) -> np.ndarray:
        """Examples of each source in a phase, which ends before example `end`."""
        full, rest = divmod(end - self.begins[phase], self.length)
        counts = self._given(phase, full)
        if not rest:
            return counts
        return counts + np.bincount(self._block(phase, full)[:rest, 0], minlength=len(self.sources))

    def _given(self, phase: int, blocks: int) -> np.ndarray:
        """Examples of each source in so many blocks of a phase."""
        whole = self._whole[phase]
        while len(whole) <= blocks:
            whole.append(whole[-1] + self._quotas(phase, len(whole) - 1, self.length))
        return whole[blocks]

    def _quotas(self, phase: int, block: int, size: int) -> np.ndarray:
        """Of a block: the whole part of each share, and one more for those that are owed most by then."""
        weights = np.array(self.phases[phase].weights)
        shares = weights / weights.sum()
        quotas = np.floor(shares * size).astype(int)
        owed = shares * (block * self.length + size) - self._given(phase, block) - quotas
        owed[shares * size == quotas] = -math.inf  # rounding takes nothing from these
        quotas[np.argsort(-owed, kind="stable")[: size - quotas.sum()]] += 1
        return quotas

    def _block(self, phase: int, block: int) -> np.ndarray:
        if (phase, block) not in self._blocks:
            made = (phase, block), self._spread(phase, block)
            self._blocks = dict([*self._blocks.items(), made][-2:])
        return self._blocks[phase, block]

    def _spread(self, phase: int, block: int) -> np.ndarray:
        ends = [*self.begins[1:], math.inf]
        size = int(min(self.length, ends[phase] - self.begins[phase] - block * self.length))
        quotas = self._quotas(phase, block, size)
        starts = self._drawn[phase] + self._given(phase, block)
        rng = np.random.default_rng((self.seed, 0, phase, block))
        places = np.concatenate([(np.arange(quota) + rng.random(quota)) / max(quota, 1) for quota in quotas])
        items = [self._draw(s, int(starts[s]), int(quota)) for s, quota in enumerate(quotas)]
        refs = np.stack([np.repeat(np.arange(len(quotas)), quotas), np.concatenate(items)], axis=1)
        return refs[np.argsort(places, kind="stable")]


class Timeline:
    """Where in the stream of examples a share of training, or an optimizer step, begins.

    Args:
        trainer: how far it trains; None for one epoch, an optimizer step a batch.
        batches: of an epoch.
        examples: of a batch, on all processes.
    """

    def __init__(self, trainer: Any, batches: int, examples: int) -> None:
        self.examples = examples
        self.accumulate = 1 if trainer is None else trainer.accumulate_grad_batches
        # PPO takes several optimizer steps on a batch.
        self.steps_per_batch = getattr(getattr(trainer, "lightning_module", None), "optimizer_steps_per_batch", 1)
        limit = 1.0 if trainer is None else trainer.limit_train_batches
        self.batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
        self.steps_per_epoch = math.ceil(self.batches / self.accumulate) * self.steps_per_batch
        epochs, steps = (1, -1) if trainer is None else (trainer.max_epochs, trainer.max_steps)
        ends = [] if epochs is None or epochs < 0 else [epochs * self.steps_per_epoch]
        self.steps: int | None = min([*ends, *([steps] if steps >= 0 else [])], default=None)

    def example(self, begin: float) -> int:
        """Number of the first example from `begin` on: below 1 a share of training, else an optimizer step.

        Raises:
            ValueError: a share of a run that has no end.
        """
        if 0 < begin < 1 and self.steps is None:
            raise ValueError(
                f"a weight that changes after {begin:.0%} of training needs to know where that ends: set "
                "trainer.max_epochs or trainer.max_steps, or begin at an optimizer step, of 1 or more"
            )
        step = round(begin * (self.steps or 0)) if begin < 1 else int(begin)
        return self._at(step)

    @property
    def end(self) -> int | None:
        """How many examples training takes; None where it has no end."""
        return None if self.steps is None else self._at(self.steps)

    def _at(self, step: int) -> int:
        epoch, rest = divmod(step, max(self.steps_per_epoch, 1))
        in_epoch = rest // self.steps_per_batch * self.accumulate
        return (epoch * self.batches + min(in_epoch, self.batches)) * self.examples


def order_of(
    sources: Sequence[Source], items: Sequence[np.ndarray], seed: int, timeline: Callable[[], Timeline]
) -> Order:
    """The order that the weights of the sources ask for."""
    changing = [source.weight for source in sources if isinstance(source.weight, list)]
    if not changing:
        return Order(items, [source.weight for source in sources], seed)  # type: ignore[misc]
    if any(source.weight is None for source in sources):
        raise ValueError("give a weight to every source or to none")
    time = timeline()
    begins = {time.example(begin) for weight in changing for begin, _ in weight} | {0}
    phases = [Phase(begin, [_weight(source, begin, time) for source in sources]) for begin in sorted(begins)]
    return PhasedOrder(items, phases, seed)


def _weight(source: Source, example: int, time: Timeline) -> float:
    """Of a source at an example: the last that has begun, 0 before the first."""
    if not isinstance(source.weight, list):
        return float(source.weight or 0.0)
    return next((weight for begin, weight in reversed(source.weight) if time.example(begin) <= example), 0.0)


def check_resumed(order: Order, begins: Sequence[int]) -> None:
    """Refuse to go on in a stream whose phases have moved: what it has not shown yet would not be what is left.

    Raises:
        ValueError: with both places.
    """
    if list(order.begins) != list(begins):
        raise ValueError(
            f"the phases of the mixture began at examples {list(begins)} and now would at {list(order.begins)}: leave "
            "the length of training as it was, or begin phases at optimizer steps in place of shares"
        )


def report(sources: Sequence[Source], order: Order, timeline: Callable[[], Timeline]) -> Iterator[str]:
    """What a mixture shows of each source, a line for each phase; nothing where every row comes once an epoch."""
    names, sizes = labels(sources), [len(items) for items in order.sources]

    def line(when: str, counts: Sequence[int]) -> str:
        total = max(sum(counts), 1)
        told = [
            f"{name} {count:,} ({count / total:.1%}{f', each {count / size:.1f} times' if count > size else ''})"
            for name, count, size in zip(names, counts, sizes, strict=True)
        ]
        return f"mixture {when}: {', '.join(told)}"

    if not isinstance(order, PhasedOrder):
        if list(order.quotas) != sizes:
            yield line("of an epoch", order.quotas)
        return
    end, ends = timeline().end, [*order.begins[1:], timeline().end]
    total = np.zeros(len(sizes), int)
    for phase, (begin, until) in enumerate(zip(order.begins, ends, strict=True)):
        until = until if end is None or until is None else min(until, end)
        if until is None:
            shares = ", ".join(f"{name} {w:g}" for name, w in zip(names, order.phases[phase].weights, strict=True))
            yield f"mixture from example {begin:,} on, by weight: {shares}"
        elif until <= begin:
            yield f"mixture from example {begin:,} on: never, as training ends after {until:,} examples"
        else:
            counts = order.counts(phase, until)
            total += counts
            yield line(f"of examples {begin:,} to {until:,}", counts.tolist())
    if end is not None and len(order.phases) > 1:
        yield line("in all", total.tolist())
