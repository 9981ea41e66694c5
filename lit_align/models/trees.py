"""Run a transformers backbone on packed, prefix-shared rows; or on one sequence a row, where it takes nothing else."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import PreTrainedConfig, PreTrainedModel

from lit_align.accelerate import kernels_of
from lit_align.accelerate.last_layer import only_read
from lit_align.accelerate.tree_attention import attends_by_tree, tree_blocks
from lit_align.functional.attention import tree_mask, tree_rule
from lit_align.functional.gather_rows import read_rows
from lit_align.functional.packing import pack, unpack
from lit_align.types import Example, PackedBatch, Segment

Read = Literal["source_S", "last_Q"]
# Kinds of attention layers whose rule the masks below follow.
MASKED_LAYERS = {"full_attention", "sliding_attention"}


def attention_mask(config: PreTrainedConfig, batch: PackedBatch, dtype: torch.dtype) -> Any:
    """The mask a model wants for packed rows: one, or one per type of layer where some see only a sliding window."""
    config = config.get_text_config()
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    types = set(getattr(config, "layer_types", None) or ())

    def mask(window: int | None) -> Tensor | BlockMask:
        where = batch.tree_RN, batch.branch_RN, batch.positions_RN, window
        if config._attn_implementation == "flex_attention":
            (rows, tokens), device = batch.tokens_RN.shape, batch.tokens_RN.device
            return create_block_mask(tree_rule(*where), rows, None, tokens, tokens, device)
        allowed = tree_mask(*where)
        if config._attn_implementation != "eager":
            return allowed
        # Eager attention adds its mask to the scores, where a boolean would add 0 or 1.
        return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill(
            ~allowed, torch.finfo(dtype).min
        )

    if len(types) > 1:
        return {kind: mask(window if kind == "sliding_attention" else None) for kind in types}
    return mask(window if not types or types == {"sliding_attention"} else None)


def compile_for_trees(model: PreTrainedModel) -> None:
    """Let packed batches run on compiled code.

    Not `model.compile()`: that would compile sampling too, again and again as its cache grows.
    """
    backbone: Any = model.base_model
    backbone.compiled = torch.compile(backbone.forward, dynamic=True)


def read_states(
    backbone: PreTrainedModel, batch: PackedBatch, read_S: Tensor, thrifty: bool, forward: Any = None
) -> Tensor:
    """Last hidden states of tokens of a batch, by way of a mask over its rows.

    Args:
        backbone: the transformer below the head.
        batch: rows of trees.
        read_S: which of its R * N tokens; any may occur twice.
        thrifty: compute the last layer for these alone.
        forward: what to call in the backbone's place, if something does the same.

    Returns:
        Shape (S, H).
    """
    with only_read(backbone, read_S, batch.tokens_RN.shape) if thrifty else nullcontext():
        output = (forward or backbone)(
            input_ids=batch.tokens_RN,
            position_ids=batch.positions_RN,
            attention_mask=attention_mask(backbone.config, batch, backbone.dtype),
            use_cache=False,
        )
    return read_rows(output.last_hidden_state.flatten(0, 1), read_S)


def read_states_by_tree(backbone: PreTrainedModel, batch: PackedBatch, read_S: Tensor, thrifty: bool) -> Tensor:
    """The same tree by tree, all in one row: where rows end early, nothing is computed."""
    there_M = batch.tree_RN.flatten() >= 0
    tokens_T, tree_T, branch_T, positions_T = (
        x.flatten()[there_M] for x in (batch.tokens_RN, batch.tree_RN, batch.branch_RN, batch.positions_RN)
    )
    read_S = (there_M.cumsum(0) - 1)[read_S]
    with only_read(backbone, read_S, tokens_T[None].shape) if thrifty else nullcontext():
        output = backbone(
            input_ids=tokens_T[None],
            position_ids=positions_T[None],
            # Nobody looks at it, but transformers makes one of its own if it gets none.
            attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool),
            blocks=tree_blocks(tree_T, branch_T, positions_T, backbone.dtype),
            use_cache=False,
        )
    return read_rows(output.last_hidden_state[0], read_S)


def read_states_unpacked(backbone: PreTrainedModel, batch: PackedBatch, read_S: Tensor) -> Tensor:
    """The same from a batch with one sequence a row, by way of the plain two-dimensional mask."""
    output = backbone(input_ids=batch.tokens_RN, attention_mask=(batch.tree_RN >= 0).long(), use_cache=False)
    return read_rows(output.last_hidden_state.flatten(0, 1), read_S)


def read_states_by_length(
    backbone: PreTrainedModel, batch: PackedBatch, read_S: Tensor, switch: int | None = None
) -> Tensor:
    """The same without any padding: sequences of one length at a time.

    Args:
        backbone: the transformer below the head.
        batch: one sequence a row.
        read_S: which of its R * N tokens; any may occur twice.
        switch: padding does no harm, but sequences of at most so many tokens must not stand beside longer ones; None
            if no two lengths may stand together.
    """
    length_R = (batch.tree_RN >= 0).sum(1)
    group_R = length_R if switch is None else (length_R > switch).long()
    pieces, rows = [], []
    for group in group_R.unique().tolist():
        row_G = torch.nonzero(group_R == group)[:, 0]
        longest = int(length_R[row_G].max())
        mask_GN = None if switch is None else (batch.tree_RN[row_G, :longest] >= 0).long()
        output = backbone(input_ids=batch.tokens_RN[row_G, :longest], attention_mask=mask_GN, use_cache=False)
        states_GNH = output.last_hidden_state
        pieces.append(nn.functional.pad(states_GNH, (0, 0, 0, batch.tokens_RN.shape[1] - longest)))
        rows.append(row_G)
    states_RNH = torch.cat(pieces)[torch.cat(rows).argsort()]
    return read_rows(states_RNH.flatten(0, 1), read_S)


def length_switch(config: PreTrainedConfig) -> int | None:
    """Longest sequence of a model's first set of rotary frequencies, if longer ones get others (LongRoPE).

    transformers chooses by the longest position of a call, so a short sequence beside a long one would be turned by
    the frequencies of the long one.
    """
    config = config.get_text_config()
    found: list[dict[str, Any]] = [getattr(config, "rope_parameters", None) or {}]
    found += [inner for inner in found[0].values() if isinstance(inner, dict)]
    for parameters in found:
        if parameters.get("rope_type") == "longrope":
            length = parameters.get("original_max_position_embeddings")
            return int(length or getattr(config, "original_max_position_embeddings", config.max_position_embeddings))
    return None


class TreeModel(nn.Module):
    """A transformers model whose backbone runs on packed batches, where it can take them.

    Whether it can is not guessed from its name: a probe compares a small tree with its sequences run alone. Recurrent
    and convolutional models, and those that read positions off the mask, fail it; they get one sequence a row, through
    the same batch type. Those that see the padding of such rows, too, get sequences of one length at a time.

    Attributes:
        hf: the transformers model, head included.
        by_tree: whether it attends tree by tree, which is faster on a CPU.
        packs: whether the backbone supports packed trees.
        pads: whether sequences of different length may be padded.
        switch: see `length_switch`.
        thrifty: whether its last layer can be computed for single tokens.
    """

    def __init__(self, hf: PreTrainedModel) -> None:
        super().__init__()
        self.hf = hf
        self.switch = length_switch(hf.config)
        # Skip when compiled: each tree count would trigger a recompile.
        by_tree = attends_by_tree(self.backbone) and not self._compiled
        self.by_tree = by_tree and _takes_trees(self.backbone, by_tree=True)
        self.packs = self.by_tree or _takes_trees(self.backbone)
        # Skip when compiled: changing hooks would trigger recompiles.
        thrifty = self.packs and not self._compiled and "last_layer" in kernels_of(hf)
        self.thrifty = thrifty and _takes_trees(self.backbone, self.by_tree, thrifty=True)
        self.pads = self.packs or _same_as_alone(self.backbone, read_states_unpacked)
        if not self.packs:
            rows = (
                "each sequence gets a row of its own" if self.pads else "sequences of one length are computed together"
            )
            warnings.warn(
                f"{type(self.backbone).__name__} takes no mask of trees: {rows}, and prompts are computed once per "
                "answer",
                stacklevel=2,
            )

    @property
    def backbone(self) -> PreTrainedModel:
        """The transformer below the head."""
        base = self.hf.base_model
        if base is self.hf:  # Llama 4 names another prefix than its transformer has
            below = [child for child in self.hf.children() if isinstance(child, PreTrainedModel)]
            base = below[0] if len(below) == 1 else base
        return cast(PreTrainedModel, base)

    @property
    def _compiled(self) -> Any:
        """What `compile_for_trees` made of the backbone; None where it was not called."""
        return getattr(self.backbone, "compiled", None)

    def hidden(self, batch: PackedBatch, read: Read = "source_S") -> tuple[Tensor, PackedBatch]:
        """Last hidden states, and the batch whose rows they are of.

        Args:
            batch: R rows of N tokens.
            read: which states: those that predict a scored token, shape (S, H), or those at the end of each sequence,
                shape (Q, H).
        """
        switched = self.switch is not None and bool((batch.positions_RN >= self.switch).any())
        if not self.packs or switched:
            batch = unpack(batch)
            if switched or not self.pads:
                switch = self.switch if self.pads else None
                return read_states_by_length(self.backbone, batch, getattr(batch, read), switch), batch
            return read_states_unpacked(self.backbone, batch, getattr(batch, read)), batch
        if self.by_tree and batch.tokens_RN.device.type == "cpu":
            return read_states_by_tree(self.backbone, batch, getattr(batch, read), self.thrifty), batch
        return read_states(self.backbone, batch, getattr(batch, read), self.thrifty, self._compiled), batch


@torch.no_grad()
def _takes_trees(backbone: PreTrainedModel, by_tree: bool = False, thrifty: bool = False) -> bool:
    if backbone.device.type == "meta":
        return True
    config = backbone.config.get_text_config()
    if getattr(config, "window_size", None) or getattr(config, "attention_chunk_size", None):
        return False  # GPT-Neo, Llama 4: local attention by distance in the row, which a short probe cannot see
    if not set(getattr(config, "layer_types", None) or ()) <= MASKED_LAYERS:
        return False  # compressed or chunked attention, likewise
    modeling = sys.modules[type(backbone).__module__]
    if getattr(config, "sliding_window", None) and not hasattr(modeling, "create_sliding_window_causal_mask"):
        return False  # Moshi: a window in its configuration that only some of its attention kernels follow

    def read(backbone: PreTrainedModel, batch: PackedBatch, read_S: Tensor) -> Tensor:
        return (read_states_by_tree if by_tree else read_states)(backbone, batch, read_S, thrifty)

    return _same_as_alone(backbone, read, packed=True)


@torch.no_grad()
def _same_as_alone(
    backbone: PreTrainedModel, read: Callable[[PreTrainedModel, PackedBatch, Tensor], Tensor], packed: bool = False
) -> bool:
    """Whether a way to read states gives those of each sequence of a small batch alone, without padding.

    Args:
        backbone: the transformer below the head.
        read: takes the backbone, a batch and which tokens to read.
        packed: whether it is given trees, or one sequence a row.

    Raises:
        ValueError: the states are not finite, however they are computed.
    """
    if backbone.device.type == "meta":
        return True
    vocabulary = backbone.config.get_text_config().vocab_size
    segments = [
        Segment([(7 * i + 3 * k + 1) % vocabulary for i in range(n)], [False] * n) for k, n in enumerate((3, 2, 4))
    ]
    batch = pack([Example(segments[0], segments[1:]), Example(segments[2])], row_tokens=13)
    batch = PackedBatch(*(x.to(backbone.device) for x in batch))
    training = backbone.training
    backbone.eval()
    try:
        alone = unpack(batch)
        lengths = (alone.tree_RN >= 0).sum(1).tolist()
        states = [
            backbone(input_ids=tokens_N[None, :length], use_cache=False).last_hidden_state[0, -1]
            for tokens_N, length in zip(alone.tokens_RN, lengths, strict=True)
        ]
        expected = torch.stack(states)
        if not expected.isfinite().all():
            raise ValueError(f"{backbone.config.name_or_path}: some weights are not finite, and so is no output")
        batch = batch if packed else alone
        try:
            got = read(backbone, batch, batch.last_Q)
        except torch.OutOfMemoryError:
            raise  # says nothing of the model
        except (ValueError, RuntimeError, TypeError, IndexError, AttributeError, AssertionError):
            return False
    finally:
        backbone.train(training)
    half = backbone.dtype in (torch.bfloat16, torch.float16) or torch.is_autocast_enabled(backbone.device.type)
    tolerance = 0.1 if half else 1e-3
    return bool((got - expected).abs().max() <= tolerance * expected.abs().max())
