"""Attention masks for rows that hold several trees of tokens."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Rule = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def tree_mask(tree_RN: Tensor, branch_RN: Tensor, positions_RN: Tensor, window: int | None = None) -> Tensor:
    """Boolean attention mask of packed, prefix-shared rows.

    A token attends to the earlier tokens of its own tree that lie in the trunk (branch 0) or in its own branch. Every
    token attends to itself, also where a row ends early: a row of the mask without any True gives NaN.

    Args:
        tree_RN: tree of each token, -1 where a row ends early. Shape (R, N).
        branch_RN: 0 in a trunk, k in the k-th branch. Shape (R, N).
        positions_RN: position of each token in its own sequence. Shape (R, N).
        window: attend only to tokens less than this many positions back (sliding-window layers).

    Returns:
        True where the query (third axis) may attend to the key (last axis). Shape (R, 1, N, N).
    """
    same_tree = tree_RN[:, :, None] == tree_RN[:, None, :]
    on_path = (branch_RN[:, None, :] == 0) | (branch_RN[:, :, None] == branch_RN[:, None, :])
    n = tree_RN.shape[1]
    causal = torch.ones(n, n, dtype=torch.bool, device=tree_RN.device).tril()
    mask = same_tree & on_path & causal & (tree_RN >= 0)[:, :, None]
    if window is not None:
        # Distance within the sequence, not within the row: a branch may lie far from its trunk.
        mask &= positions_RN[:, :, None] - positions_RN[:, None, :] < window
    mask |= torch.eye(n, dtype=torch.bool, device=tree_RN.device)
    return mask[:, None]


def tree_rule(tree_RN: Tensor, branch_RN: Tensor, positions_RN: Tensor, window: int | None = None) -> Rule:
    """The mask of `tree_mask` as a function of row, head, query and key, for FlexAttention (Dong et al. 2024).

    FlexAttention skips blocks that are masked everywhere, so a row of many trees costs as much as its trees.

    Args:
        tree_RN: see `tree_mask`.
        branch_RN: likewise.
        positions_RN: likewise.
        window: likewise.

    Returns:
        A `mask_mod` of `torch.nn.attention.flex_attention.create_block_mask`.
    """

    def rule(r: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        tree, branch = tree_RN[r, q], branch_RN[r, k]
        sees = (q >= k) & (tree >= 0) & (tree == tree_RN[r, k]) & ((branch == 0) | (branch == branch_RN[r, q]))
        if window is not None:
            sees = sees & (positions_RN[r, q] - positions_RN[r, k] < window)
        return sees | (q == k)

    return rule
