"""The mask of packed trees, against a definition that never looks at the mask's own arithmetic.

A mutant that a test was seen to kill is named above it.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lit_align.functional.attention import tree_mask, tree_rule

# A tree: tokens of the trunk, tokens of each branch.
TREES = st.lists(st.tuples(st.integers(1, 4), st.lists(st.integers(1, 3), max_size=3)), min_size=1, max_size=3)


def lay_out(trees: list[tuple[int, list[int]]], padding: int) -> tuple[Tensor, Tensor, Tensor, list[list[int]]]:
    """One row: trees, branches, positions, and for each token the columns of its sequence up to and with itself."""
    tree: list[int] = []
    branch: list[int] = []
    position: list[int] = []
    paths: list[list[int]] = []
    for t, (trunk, branches) in enumerate(trees):
        start = len(tree)
        trunk_columns = list(range(start, start + trunk))
        for k, length in enumerate([trunk, *branches]):
            for i in range(length):
                own = list(range(len(tree) - i, len(tree) + 1))
                path = own if k == 0 else trunk_columns + own
                paths.append(path)
                tree.append(t)
                branch.append(k)
                position.append(len(path) - 1)
    for _ in range(padding):
        paths.append([len(tree)])
        tree.append(-1)
        branch.append(0)
        position.append(0)
    return torch.tensor([tree]), torch.tensor([branch]), torch.tensor([position]), paths


# Kills: on_path without branch 0; on_path seen from the query; window on columns of the row.
def test_trunk_two_branches_and_padding_by_hand() -> None:
    tree_RN = torch.tensor([[0, 0, 0, 0, 0, 1, -1, -1]])
    branch_RN = torch.tensor([[0, 0, 1, 1, 2, 0, 0, 0]])
    positions_RN = torch.tensor([[0, 1, 2, 3, 2, 0, 0, 0]])
    rows = [
        "1.......",
        "11......",
        "111.....",
        "1111....",
        "11..1...",  # the second branch sees the trunk, and nothing of the first branch
        ".....1..",
        "......1.",  # padding sees itself alone, other padding not
        ".......1",
    ]
    expected = torch.tensor([[letter == "1" for letter in row] for row in rows])
    mask = tree_mask(tree_RN, branch_RN, positions_RN)
    assert mask.shape == (1, 1, 8, 8)
    assert mask.dtype == torch.bool
    assert torch.equal(mask[0, 0], expected)
    # A window of 2 is the token and the one before it in its *sequence*: column 4 sees column 1, three columns back.
    expected[[2, 3, 3, 4], [0, 0, 1, 0]] = False
    assert torch.equal(tree_mask(tree_RN, branch_RN, positions_RN, window=2)[0, 0], expected)


# Kills: tril -> triu; same_tree dropped; on_path dropped; window < -> <=; window sign; tree >= 0 dropped.
@settings(max_examples=60, deadline=None, derandomize=True)
@given(TREES, st.integers(0, 3), st.one_of(st.none(), st.integers(1, 5)))
def test_a_token_sees_the_last_window_tokens_of_its_own_sequence(
    trees: list[tuple[int, list[int]]], padding: int, window: int | None
) -> None:
    tree_RN, branch_RN, positions_RN, paths = lay_out(trees, padding)
    mask_NN = tree_mask(tree_RN, branch_RN, positions_RN, window)[0, 0]
    for query, path in enumerate(paths):
        assert mask_NN[query].nonzero().flatten().tolist() == (path if window is None else path[-window:])


# Kills: eye dropped.
def test_every_row_of_the_mask_has_a_true_so_that_no_softmax_is_nan() -> None:
    tree_RN = torch.tensor([[0, 0, -1], [-1, -1, -1]])
    mask = tree_mask(tree_RN, torch.zeros_like(tree_RN), torch.tensor([[0, 1, 0], [0, 0, 0]]))
    assert mask.any(-1).all()
    assert not torch.zeros(2, 1, 3, 3).masked_fill(~mask, -torch.inf).softmax(-1).isnan().any()


def test_rows_do_not_mix() -> None:
    tree_RN = torch.tensor([[0, 0, 1], [2, 3, 3]])
    branch_RN = torch.tensor([[0, 1, 0], [0, 0, 1]])
    positions_RN = torch.tensor([[0, 1, 0], [0, 0, 1]])
    both = tree_mask(tree_RN, branch_RN, positions_RN)
    alone = [tree_mask(tree_RN[r : r + 1], branch_RN[r : r + 1], positions_RN[r : r + 1]) for r in range(2)]
    assert torch.equal(both, torch.cat(alone))


# Kills: query and key exchanged; the window counted along the row; rows' ends that see others.
@pytest.mark.parametrize("window", [None, 2, 3])
def test_the_rule_is_the_mask(window: int | None) -> None:
    draw = torch.Generator().manual_seed(0)
    tree_RN = torch.randint(0, 3, (4, 24), generator=draw).sort(1).values
    tree_RN[:, 20:] = -1
    branch_RN = torch.randint(0, 3, (4, 24), generator=draw)
    positions_RN = torch.randint(0, 9, (4, 24), generator=draw)
    rule = tree_rule(tree_RN, branch_RN, positions_RN, window)
    r, q, k = torch.meshgrid(torch.arange(4), torch.arange(24), torch.arange(24), indexing="ij")
    assert torch.equal(rule(r, torch.zeros_like(r), q, k), tree_mask(tree_RN, branch_RN, positions_RN, window)[:, 0])
