"""Attention on packed rows, tree by tree, for CPUs.

A dense mask over a row of several trees computes every product of two tokens and throws most of them away: with trees
of 300 tokens in rows of 1,024, two thirds. Here each tree is a call of its own, and a tree without branches takes the
causal kernel, which needs no mask at all.

Share of a training step that this saves (experiments/bench/kernels.py): sft 18.2%.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from lit_align.functional.attention import tree_mask

NAME = "lit_align_trees"


# Small trees share a call: below this many tokens it costs more to make one than to compute what its mask hides.
TOGETHER = 128


class TreeBlocks(NamedTuple):
    """A row of trees, cut into blocks that attend to themselves alone.

    Attributes:
        lengths: tokens of each.
        masks: what is added to its attention scores, or whether they count, shape (1, 1, queries, n); None for a chain,
            which is causal.
        read: tokens of the row that are its queries, ascending; None if all are.
        counts: queries in each block; None if all tokens are.
    """

    lengths: list[int]
    masks: list[Tensor | None]
    read: Tensor | None = None
    counts: list[int] | None = None

    def only(self, read_U: Tensor) -> TreeBlocks:
        """The same for few queries: these, ascending, and all of a chain of which they are the better part.

        With a mask of its own the chain would cost more than they save.
        """
        ends = torch.tensor(self.lengths).cumsum(0)
        counts = torch.bincount(torch.bucketize(read_U, ends, right=True), minlength=len(ends)).tolist()
        read: list[Tensor] = []
        masks: list[Tensor | None] = []
        for here, end, length, mask in zip(read_U.split(counts), ends.tolist(), self.lengths, self.masks, strict=True):
            rows = here - (end - length)
            if mask is not None:
                mask = mask[:, :, rows]
            elif 2 * len(rows) > length:
                here = torch.arange(end - length, end)
            else:
                mask = (torch.arange(length) <= rows[:, None])[None, None]
            read.append(here)
            masks.append(mask)
        return TreeBlocks(self.lengths, masks, torch.cat(read), [len(here) for here in read])


def tree_blocks(tree_T: Tensor, branch_T: Tensor, positions_T: Tensor, dtype: torch.dtype) -> TreeBlocks:
    """Cut a row of T tokens into large trees and groups of small ones; see `PackedBatch` for the arguments."""
    lengths: list[int] = []
    trees: list[int] = []  # in each block
    for length in torch.unique_consecutive(tree_T, return_counts=True)[1].tolist():
        if lengths and lengths[-1] + length <= TOGETHER:
            lengths[-1] += length
            trees[-1] += 1
        else:
            lengths.append(length)
            trees.append(1)
    masks: list[Tensor | None] = []
    columns = (x.split(lengths) for x in (tree_T, branch_T, positions_T))
    for count, tree, branch, positions in zip(trees, *columns, strict=True):
        if count == 1 and branch.max() <= 1:
            masks.append(None)
            continue
        allowed = tree_mask(tree[None], branch[None], positions[None])
        # Additive and made once: from a boolean one torch would make it anew in every layer.
        masks.append(torch.zeros(allowed.shape, dtype=dtype).masked_fill(~allowed, -torch.inf))
    return TreeBlocks(lengths, masks)


def tree_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    blocks: TreeBlocks | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention of each tree to itself; without `blocks` (when sampling, say) transformers' own.

    Args:
        module: the attention layer.
        query: shape (1, heads, T, head size); without `blocks` any.
        key: the same, with as many heads or fewer.
        value: likewise.
        attention_mask: used without `blocks` only.
        dropout: of the attention weights.
        scaling: of the scores.
        blocks: where the trees lie.
        options: of transformers.

    Returns:
        Shape (1, T, heads, head size), zeros where it is not wanted, and no weights.
    """
    if blocks is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **options)
    wanted = query if blocks.read is None else query.index_select(2, blocks.read)
    # Keys and values that heads share are repeated for the row at once, and not in a call for each tree.
    key, value = (repeat_kv(x, query.shape[1] // x.shape[1]) for x in (key, value))
    # Split and not sliced: the gradient of many slices is as many whole tensors of zeros.
    parts = zip(
        wanted.split(blocks.counts or blocks.lengths, 2),
        key.split(blocks.lengths, 2),
        value.split(blocks.lengths, 2),
        blocks.masks,
        strict=True,
    )
    pieces = [
        scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=mask is None, scale=scaling).transpose(1, 2)
        for q, k, v, mask in parts
        if q.shape[2]
    ]
    output = torch.cat(pieces, 1)
    if blocks.read is None:
        return output, None
    return output.new_zeros(1, query.shape[2], *output.shape[2:]).index_copy(1, blocks.read, output), None


def put_on_tree_attention(model: PreTrainedModel) -> None:
    """Let a model that would use torch's attention use this."""
    if model.config._attn_implementation == "sdpa":
        AttentionInterface.register(NAME, tree_attention)
        AttentionMaskInterface.register(NAME, sdpa_mask)
        model.set_attn_implementation(NAME)


def put_off_tree_attention(model: PreTrainedModel) -> None:
    """Undo `put_on_tree_attention`."""
    if model.config._attn_implementation == NAME:
        model.set_attn_implementation("sdpa")


def attends_by_tree(backbone: PreTrainedModel) -> bool:
    """Whether it does, and all its layers see everything before them."""
    config = backbone.config.get_text_config()
    windows = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    return config._attn_implementation == NAME and not windows and backbone.device.type == "cpu"
