"""Rows of trees: every layout must say the same of every sequence.

A mutant that a test was seen to kill is named above it.
"""

from itertools import count

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_align.functional.attention import tree_mask
from lit_align.functional.packing import balance, best_fit_decreasing, pack, split_bins, unpack, unshare
from lit_align.types import Example, PackedBatch, Segment

LAYOUTS = st.fixed_dictionaries(
    {
        "share_prefix": st.booleans(),
        "packing": st.booleans(),
        "row_tokens": st.one_of(st.none(), st.integers(1, 40)),
    }
)


def segment(*tokens: int, scored: bool = True) -> Segment:
    return Segment(list(tokens), [scored] * len(tokens))


@st.composite
def example_lists(draw: st.DrawFn) -> list[Example]:
    """Examples in which no two tokens have the same id, so that an id says where it came from."""
    ids = count(1)

    def some(minimum: int, scorable: bool) -> Segment:
        flags = draw(st.lists(st.booleans(), min_size=minimum, max_size=4))
        return Segment([next(ids) for _ in flags], [flag and scorable for flag in flags])

    examples = []
    for _ in range(draw(st.integers(1, 4))):
        branches = draw(st.integers(0, 3))
        trunk = some(1, scorable=not branches)
        trunk.scored[0] = False  # type: ignore[index]
        examples.append(Example(trunk, [some(0, scorable=True) for _ in range(branches)]))
    return examples


def sequences_of(examples: list[Example]) -> list[tuple[list[int], list[bool]]]:
    """Tokens and flags of every sequence, joined by hand."""
    joined = []
    for trunk, branches in examples:
        for branch in branches or [Segment([], [])]:
            joined.append(([*trunk.tokens, *branch.tokens], [*trunk.scored, *branch.scored]))
    return joined


def check(batch: PackedBatch, examples: list[Example]) -> None:
    """Every field of a batch against the examples themselves."""
    tokens, positions, trees = (x.flatten().tolist() for x in (batch.tokens_RN, batch.positions_RN, batch.tree_RN))
    width = batch.tokens_RN.shape[1]
    sequences = sequences_of(examples)
    mask_RNN = tree_mask(batch.tree_RN, batch.branch_RN, batch.positions_RN)[:, 0]

    # The same scored tokens in the same order, whatever the layout.
    listed = [
        (q, token) for q, (ids, flags) in enumerate(sequences) for token, flag in zip(ids, flags, strict=True) if flag
    ]
    assert list(zip(batch.sequence_S.tolist(), batch.target_S.tolist(), strict=True)) == listed
    assert batch.example_Q.tolist() == [e for e, x in enumerate(examples) for _ in range(max(1, len(x.branches)))]
    assert (batch.num_sequences, batch.num_examples, batch.num_scored) == (len(sequences), len(examples), len(listed))

    # A sequence's last token is its last, and sees the whole sequence in order, at positions 0, 1, 2 ...
    for (ids, _), last in zip(sequences, batch.last_Q.tolist(), strict=True):
        row = last // width
        seen = [row * width + column for column in mask_RNN[row, last % width].nonzero().flatten().tolist()]
        assert [tokens[i] for i in seen] == ids
        assert [positions[i] for i in seen] == list(range(len(ids)))

    # The state that predicts belongs to the same tree and to the token just before the target in its own sequence.
    for q, target, source in zip(
        batch.sequence_S.tolist(), batch.target_S.tolist(), batch.source_S.tolist(), strict=True
    ):
        ids, _ = sequences[q]
        assert tokens[source] == ids[ids.index(target) - 1]
        assert trees[source] == trees[batch.last_Q[q]]

    # Where a row ends early there is nothing.
    for token, position, tree in zip(tokens, positions, trees, strict=True):
        assert (tree >= 0) == (token > 0)
        assert tree >= 0 or position == 0


# Kills: sorted ascending; first fit, worst fit; an exact fit refused (bisect_right); room not reduced.
def test_best_fit_decreasing_by_hand() -> None:
    # 60 and 51 open a bin each and leave 40 and 49. 41 fits the second alone, and leaves 8. Then 7 fits both: the
    # second more tightly, though the first comes first and is emptier.
    assert best_fit_decreasing([7, 60, 41, 51], 100) == [[1], [3, 2, 0]]
    # 7 | 6, then 3 fills the first to the brim, and 2 and 2 the second.
    assert best_fit_decreasing([3, 2, 7, 6, 2], 10) == [[2, 0], [3, 1, 4]]
    assert best_fit_decreasing([], 10) == []


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 20), max_size=30), st.integers(20, 50))
def test_best_fit_decreasing_loses_nothing_and_never_overfills(lengths: list[int], capacity: int) -> None:
    bins = best_fit_decreasing(lengths, capacity)
    assert sorted(item for bin_ in bins for item in bin_) == list(range(len(lengths)))
    sums = [sum(lengths[item] for item in bin_) for bin_ in bins]
    assert all(total <= capacity for total in sums)
    # No bin would have fitted whole into another, else it had not been opened.
    assert all(a + b > capacity for i, a in enumerate(sums) for b in sums[:i])


# Kills: length check dropped.
def test_an_item_longer_than_a_bin_is_an_error() -> None:
    with pytest.raises(ValueError, match="item 1 has length 11, above the capacity of 10"):
        best_fit_decreasing([10, 11], 10)


# Kills: shortest first; the fullest part; counts left open; parts left unsorted.
def test_balance_by_hand() -> None:
    # 9 | 8, then 5 to the 8, 2 to the 9, and 1 to the 11 that this makes, as 13 is more. It is full; so 1 to the 13.
    assert balance([1, 9, 5, 8, 1, 2], 2) == [[0, 1, 5], [2, 3, 4]]
    assert balance([3, 1, 2], 1) == [[0, 1, 2]]
    # By length alone the last part would get all the short ones.
    assert [len(share) for share in balance([100, 1, 1, 1, 1, 1], 2)] == [3, 3]
    with pytest.raises(ValueError, match="3 items cannot be shared out equally to 2 parts"):
        balance([1, 2, 3], 2)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 500), min_size=1, max_size=24), st.integers(1, 6))
def test_balance_shares_everything_out_evenly(lengths: list[int], parts: int) -> None:
    lengths = lengths * parts
    shares = balance(lengths, parts)
    assert sorted(item for share in shares for item in share) == list(range(len(lengths)))
    assert {len(share) for share in shares} == {len(lengths) // parts}
    sums = [sum(lengths[item] for item in share) for share in shares]
    # Whatever is shared out last, or for want of room, is no longer than the longest.
    assert max(sums) - min(sums) <= max(lengths) * max(len(lengths) // parts, 1)


# Kills: source without - 1; source + 1; first token of a branch predicted by its left neighbour in the row; branch
# positions from 0; branch numbers from 0; last off by one.
def test_prompt_with_two_answers_by_hand() -> None:
    prompt = segment(11, 12, 13, scored=False)
    batch = pack([Example(prompt, [segment(21, 22), segment(31, 32)]), Example(Segment([41, 42], [False, True]))])
    assert batch.tokens_RN.tolist() == [[11, 12, 13, 21, 22, 31, 32], [41, 42, 0, 0, 0, 0, 0]]
    assert batch.positions_RN.tolist() == [[0, 1, 2, 3, 4, 3, 4], [0, 1, 0, 0, 0, 0, 0]]
    assert batch.tree_RN.tolist() == [[0] * 7, [1, 1, -1, -1, -1, -1, -1]]
    assert batch.branch_RN.tolist() == [[0, 0, 0, 1, 1, 2, 2], [0] * 7]
    assert batch.source_S.tolist() == [2, 3, 2, 5, 7]  # 13 predicts both 21 and 31
    assert batch.target_S.tolist() == [21, 22, 31, 32, 42]
    assert batch.sequence_S.tolist() == [0, 0, 1, 1, 2]
    assert batch.last_Q.tolist() == [4, 6, 8]
    assert batch.example_Q.tolist() == [0, 0, 1]
    assert all(x.dtype == torch.long for x in batch)


# Kills: layout options that change what is listed; sequences in the order of the rows; unshare without the trunk.
@settings(max_examples=150, deadline=None, derandomize=True)
@given(example_lists(), LAYOUTS)
def test_every_layout_says_the_same_of_every_sequence(examples: list[Example], layout: dict) -> None:
    batch = pack(examples, **layout)
    check(batch, examples)
    trees = examples if layout["share_prefix"] else [tree for example in examples for tree in unshare(example)]
    assert int((batch.tree_RN >= 0).sum()) == sum(tree.num_tokens for tree in trees)
    assert batch.tokens_RN.shape[1] <= max(layout["row_tokens"] or 0, *(tree.num_tokens for tree in trees))
    if not layout["packing"]:
        assert len(batch.tokens_RN) == len(trees)


# Kills: unpack with the trunk left out, with other branches let in, with the source of the packed row.
@settings(max_examples=150, deadline=None, derandomize=True)
@given(example_lists(), LAYOUTS)
def test_unpacking_gives_one_sequence_a_row(examples: list[Example], layout: dict) -> None:
    alone = unpack(pack(examples, **layout))
    check(alone, examples)
    for got, expected in zip(alone, pack(examples, share_prefix=False, packing=False), strict=True):
        assert torch.equal(got, expected)


# Kills: rows as wide as row_tokens even where nothing is that long; row_tokens ignored.
def test_rows_are_as_wide_as_their_fullest() -> None:
    examples = [Example(segment(1, 2, 3, scored=False)), Example(segment(4, 5, scored=False))]
    assert pack(examples).tokens_RN.shape == (2, 3)
    assert pack(examples, row_tokens=5).tokens_RN.tolist() == [[1, 2, 3, 4, 5]]
    assert pack(examples, row_tokens=100).tokens_RN.shape == (1, 5)
    assert pack(examples, row_tokens=100, packing=False).tokens_RN.shape == (2, 3)
    assert pack(examples, row_tokens=1).tokens_RN.shape == (2, 3)


# Kills: the check dropped; the check only for sequences without branches (state -1 or another tree's).
@pytest.mark.parametrize("share_prefix", [True, False])
@pytest.mark.parametrize("example", [Example(segment(1, 2)), Example(segment(), [segment(1), segment(2)])])
def test_a_scored_first_token_is_an_error(example: Example, share_prefix: bool) -> None:
    with pytest.raises(ValueError, match="first token of a sequence cannot be scored"):
        pack([Example(segment(8, 9, scored=False)), example], row_tokens=20, share_prefix=share_prefix)


# Kills: last token of an empty branch looked for beside it in the row.
@pytest.mark.parametrize("share_prefix", [True, False])
def test_an_empty_answer_ends_where_its_prompt_does(share_prefix: bool) -> None:
    examples = [Example(segment(1, 2, scored=False), [segment(3, 4), segment()])]
    batch = pack(examples, share_prefix=share_prefix)
    check(batch, examples)
    assert batch.tokens_RN.flatten()[batch.last_Q].tolist() == [4, 2]


@pytest.mark.parametrize("share_prefix", [True, False])
@pytest.mark.parametrize("example", [Example(segment()), Example(segment(), [segment()])])
def test_a_sequence_without_tokens_is_an_error(example: Example, share_prefix: bool) -> None:
    with pytest.raises(ValueError, match="without tokens"):
        pack([Example(segment(8, 9, scored=False)), example], share_prefix=share_prefix)


def test_a_batch_without_scored_tokens_has_empty_lists() -> None:
    batch = pack([Example(segment(1, 2, scored=False))])
    for x in (batch.source_S, batch.target_S, batch.sequence_S, unpack(batch).source_S):
        assert x.shape == (0,)
        assert x.dtype == torch.long


# Kills: trunk tokens counted per branch.
def test_tokens_of_an_example_count_its_prompt_once() -> None:
    assert Example(segment(1, 2, 3), [segment(4), segment(5, 6)]).num_tokens == 6
    assert Example(segment(1, 2, 3)).num_tokens == 3


# Killed: bins cut to fewer than asked, and to empty ones.
@given(st.lists(st.integers(1, 5), min_size=1, max_size=6), st.data())
def test_bins_are_cut_to_as_many_as_asked(sizes: list[int], data: st.DataObject) -> None:
    ids = count()
    bins = [[next(ids) for _ in range(size)] for size in sizes]
    number = data.draw(st.integers(1, sum(sizes)))
    cut = split_bins(bins, number)
    assert len(cut) == max(number, len(bins))
    assert all(cut)
    assert sorted(item for items in cut for item in items) == list(range(sum(sizes)))
