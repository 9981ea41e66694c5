from collections import Counter

import numpy as np
import pytest
from data.fuzz import fuzz
from hypothesis import given
from hypothesis import strategies as st

from lit_align.data.order import Order, split_by_group

SIZES = st.lists(st.integers(0, 12), min_size=1, max_size=4).filter(any)


def stream(order: Order, count: int, start: int = 0) -> list[tuple[int, int]]:
    return [order[n] for n in range(start, start + count)]


@fuzz
@given(SIZES, st.integers(0, 3))
def test_without_weights_every_item_comes_once_an_epoch(sizes: list[int], seed: int) -> None:
    order = Order([range(100, 100 + size) for size in sizes], [None] * len(sizes), seed)
    everything = {(s, 100 + i) for s, size in enumerate(sizes) for i in range(size)}
    assert len(order) == len(everything) == sum(sizes)
    for epoch in range(3):
        drawn = stream(order, len(order), epoch * len(order))
        assert len(drawn) == len(set(drawn))
        assert set(drawn) == everything


def test_the_order_is_a_function_of_seed_and_epoch() -> None:
    def epoch(number: int, seed: int) -> list[tuple[int, int]]:
        return stream(Order([range(20), range(5)], [None, None], seed), 25, 25 * number)

    np.random.seed(1)  # nobody looks at it
    first = epoch(3, 0)
    np.random.seed(2)
    assert epoch(3, 0) == first
    assert len({tuple(epoch(n, seed)) for n in range(4) for seed in range(4)}) == 16
    # Known for ever: a resumed run of another version must find the same order.
    assert stream(Order([range(4), range(2)], [None, None], 0), 8) == KNOWN


def test_any_position_can_be_asked_for_at_any_time() -> None:
    order, again = (Order([range(7), range(4)], [2.0, 1.0], 5) for _ in range(2))
    straight = stream(order, 55)
    places = [54, 0, 30, 11, 10, 31, 3, 44, 22]
    assert [again[n] for n in places] == [straight[n] for n in places]
    assert stream(again, 25, 30) == straight[30:]


def test_epochs_are_shuffled_and_mixed() -> None:
    order = Order([range(50), range(50)], [None, None], 0)
    first = stream(order, 100)
    assert first != sorted(first)
    assert 15 < sum(source == 0 for source, _ in first[:50]) < 35
    assert all(isinstance(part, int) for ref in first for part in ref)


@fuzz
@given(st.lists(st.tuples(st.integers(1, 12), st.integers(0, 5)), min_size=1, max_size=4), st.integers(0, 3))
def test_weights_are_kept_and_nothing_repeats_before_all_was_used(of: list[tuple[int, int]], seed: int) -> None:
    sizes, weights = zip(*of, strict=True)
    if not sum(weights):
        return
    order = Order([range(size) for size in sizes], [float(weight) for weight in weights], seed)
    assert len(order) == sum(sizes) == sum(order.quotas)
    for quota, weight in zip(order.quotas, weights, strict=True):
        assert abs(quota - weight / sum(weights) * len(order)) < 1
    for epoch in range(4):
        refs = stream(order, len(order), epoch * len(order))
        assert [Counter(s for s, _ in refs)[source] for source in range(len(sizes))] == order.quotas
    # A source's own stream, in the order of its draws: whole permutations, one after another.
    for source, size in enumerate(sizes):
        drawn = order._draw(source, 0, 3 * size).tolist()
        for cycle in range(3):
            assert sorted(drawn[cycle * size : (cycle + 1) * size]) == list(range(size))
        counts = Counter(item for s, item in stream(order, 4 * len(order)) if s == source)
        assert not counts or max(counts.values()) - min(counts[item] for item in range(size)) <= 1


def test_a_stream_does_not_depend_on_how_much_of_it_is_drawn_at_once() -> None:
    order = Order([range(5)], [1.0], 3)
    whole = order._draw(0, 0, 23).tolist()
    assert [*order._draw(0, 0, 4).tolist(), *order._draw(0, 4, 8).tolist(), *order._draw(0, 12, 11).tolist()] == whole
    assert order._draw(0, 7, 0).tolist() == []


def test_two_sources_of_one_size_are_shuffled_apart() -> None:
    order = Order([range(20), range(20)], [None, None], 0)
    assert order._draw(0, 0, 20).tolist() != order._draw(1, 0, 20).tolist()


def test_quotas() -> None:
    assert Order([range(10), range(90)], [1.0, 1.0], 0).quotas == [50, 50]
    assert Order([range(10), range(90)], [0.3, 0.7], 0).quotas == [30, 70]
    assert Order([range(3), range(4)], [1.0, 0.0], 0).quotas == [7, 0]
    assert Order([range(1), range(1), range(1)], [1.0, 1.0, 1.0], 0).quotas == [1, 1, 1]
    assert Order([range(5), range(5)], [1e9, 2e9], 0).quotas == [3, 7]


@pytest.mark.parametrize(
    ("sources", "weights", "says"),
    [
        ([[0], [0]], [1.0, None], "give a weight to every source or to none"),
        ([[0], [0]], [1.0, -1.0], "weights must not be negative"),
        ([[0], [0]], [0.0, 0.0], "one must be positive"),
        ([[0], [0]], [float("nan"), 1.0], "weights must not be negative"),
        ([[0], [0]], [float("inf"), 1.0], "weights must not be negative"),
        ([[0], []], [1.0, 1.0], "a source with a weight has no examples"),
    ],
)
def test_weights_that_make_no_mixture(sources: list, weights: list, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Order(sources, weights, 0)


def test_an_epoch_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    shuffle = Order._shuffle
    monkeypatch.setattr(Order, "_shuffle", lambda self, epoch: made.append(epoch) or shuffle(self, epoch))
    orders = [Order([range(10)], [None], seed) for seed in range(3)]  # prompts, PPO's text, and one more
    for n in range(25):
        for order in orders:
            order[n], order[max(n - 3, 0)]
    assert sorted(made) == [0, 0, 0, 1, 1, 1, 2, 2, 2]


GROUPS = st.lists(st.sampled_from("abcdefghijkl"), min_size=1, max_size=60)


@fuzz
@given(GROUPS, st.floats(0, 0.99))
def test_no_group_is_on_both_sides(groups: list[str], fraction: float) -> None:
    train, held_out = split_by_group(groups, fraction)
    assert sorted(train + held_out) == list(range(len(groups)))
    assert train == sorted(train)
    assert held_out == sorted(held_out)
    assert not {groups[i] for i in train} & {groups[i] for i in held_out}
    assert bool(held_out) == (fraction > 0 and len(set(groups)) > 1) or len(set(groups)) == 1


def test_the_split_depends_on_the_groups_alone() -> None:
    groups = [f"{i * 7919 % 1000:03}" for i in range(200)]
    once = {groups[i] for i in split_by_group(groups, 0.1)[1]}
    assert 10 <= len(once) <= 30
    again = groups[::-1] + groups[:50]  # another order, and rows that repeat a prompt
    assert {again[i] for i in split_by_group(again, 0.1)[1]} == once
    # More prompts, or fewer, move none; a larger share keeps those that were held out.
    more = groups + [f"more {i}" for i in range(1000)]
    assert {more[i] for i in split_by_group(more, 0.1)[1]} & set(groups) == once
    assert once < {groups[i] for i in split_by_group(groups, 0.3)[1]}


def test_the_share_held_out() -> None:
    groups = [f"prompt {i}" for i in range(20_000)]
    for fraction in (0.01, 0.1, 0.5):
        assert abs(len(split_by_group(groups, fraction)[1]) / len(groups) - fraction) < 0.01


KNOWN = [(0, 1), (0, 2), (1, 1), (1, 0), (0, 3), (0, 0), (0, 3), (1, 1)]
