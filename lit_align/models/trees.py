"""Run a transformers backbone on packed, prefix-shared rows; or on one sequence a row, where it takes nothing else."""

from __future__ import annotations

import warnings
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from lit_align.functional.attention import tree_mask
from lit_align.functional.packing import pack, unpack
from lit_align.models.tree_attention import attends_by_tree, tree_blocks
from lit_align.types import Example, PackedBatch, Segment


def attention_mask(config: PreTrainedConfig, batch: PackedBatch, dtype: torch.dtype) -> Tensor | dict[str, Tensor]:
    """The mask a model wants for packed rows: one, or one per type of layer where some see only a sliding window."""
    config = config.get_text_config()
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    types = set(getattr(config, "layer_types", None) or ())

    def mask(window: int | None) -> Tensor:
        allowed = tree_mask(batch.tree_RN, batch.branch_RN, batch.positions_RN, window)
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


def hidden_states(backbone: PreTrainedModel, batch: PackedBatch, forward: Any = None) -> Tensor:
    """Last hidden states of every token of a batch, shape (R * N, H), by way of a mask over its rows.

    Args:
        backbone: the transformer.
        batch: the tokens.
        forward: what to call in its place, if something does the same.
    """
    output = (forward or backbone)(
        input_ids=batch.tokens_RN,
        position_ids=batch.positions_RN,
        attention_mask=attention_mask(backbone.config, batch, backbone.dtype),
        use_cache=False,
    )
    return output.last_hidden_state.flatten(0, 1)


def hidden_states_by_tree(backbone: PreTrainedModel, batch: PackedBatch) -> Tensor:
    """The same tree by tree, all in one row: where rows end early, nothing is computed, and the states are 0."""
    tree_M = batch.tree_RN.flatten()
    at_T = torch.nonzero(tree_M >= 0)[:, 0]
    tokens_T, tree_T, branch_T, positions_T = (
        x.flatten()[at_T] for x in (batch.tokens_RN, tree_M, batch.branch_RN, batch.positions_RN)
    )
    output = backbone(
        input_ids=tokens_T[None],
        position_ids=positions_T[None],
        # Nobody looks at it, but transformers makes one of its own if it gets none.
        attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool),
        blocks=tree_blocks(tree_T, branch_T, positions_T, backbone.dtype),
        use_cache=False,
    )
    states_TH = output.last_hidden_state[0]
    return states_TH.new_zeros(len(tree_M), states_TH.shape[1]).index_copy(0, at_T, states_TH)


def hidden_states_unpacked(backbone: PreTrainedModel, batch: PackedBatch) -> Tensor:
    """The same from a batch with one sequence a row, by way of the plain two-dimensional mask."""
    output = backbone(input_ids=batch.tokens_RN, attention_mask=(batch.tree_RN >= 0).long(), use_cache=False)
    return output.last_hidden_state.flatten(0, 1)


class TreeModel(nn.Module):
    """A transformers model whose backbone runs on packed batches, where it can take them.

    Whether it can is not guessed from its name: a probe compares a small tree with its sequences run alone. Recurrent
    and convolutional models, and those that read positions off the mask, fail it; they get one sequence a row, through
    the same batch type.

    Attributes:
        hf: the transformers model, head included.
        by_tree: whether it attends tree by tree, which is faster on a CPU.
        packs: whether the backbone takes trees at all.
    """

    def __init__(self, hf: PreTrainedModel) -> None:
        super().__init__()
        self.hf = hf
        # Not what is compiled: tree by tree there is another graph for every number of trees.
        by_tree = attends_by_tree(self.backbone) and not self._compiled
        self.by_tree = by_tree and _takes_trees(self.backbone, by_tree=True)
        self.packs = self.by_tree or _takes_trees(self.backbone)
        if not self.packs:
            warnings.warn(
                f"{type(self.backbone).__name__} takes no mask of trees: each sequence gets a row of its own, and "
                "prompts are computed once per answer",
                stacklevel=2,
            )

    @property
    def backbone(self) -> PreTrainedModel:
        """The transformer below the head."""
        return cast(PreTrainedModel, self.hf.base_model)

    @property
    def _compiled(self) -> Any:
        """What `compile_for_trees` made of the backbone; None where it was not called."""
        return getattr(self.backbone, "compiled", None)

    def hidden(self, batch: PackedBatch) -> tuple[Tensor, PackedBatch]:
        """Hidden states of shape (R * N, H), and the batch whose rows they are of."""
        if self.packs:
            if self.by_tree and batch.tokens_RN.device.type == "cpu":
                return hidden_states_by_tree(self.backbone, batch), batch
            return hidden_states(self.backbone, batch, self._compiled), batch
        batch = unpack(batch)
        return hidden_states_unpacked(self.backbone, batch), batch


@torch.no_grad()
def _takes_trees(backbone: PreTrainedModel, by_tree: bool = False) -> bool:
    if backbone.device.type == "meta":
        return True
    config = backbone.config.get_text_config()
    if getattr(config, "window_size", None) or getattr(config, "attention_chunk_size", None):
        return False  # GPT-Neo, Llama 4: local attention by distance in the row, which a short probe cannot see
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
        expected = hidden_states_unpacked(backbone, alone)[alone.last_Q]
        if not expected.isfinite().all():
            raise ValueError(f"{backbone.config.name_or_path}: some weights are not finite, and so is no output")
        try:
            got = (hidden_states_by_tree if by_tree else hidden_states)(backbone, batch)[batch.last_Q]
        except (ValueError, RuntimeError, TypeError, IndexError, AttributeError):
            return False
    finally:
        backbone.train(training)
    tolerance = 0.1 if backbone.dtype in (torch.bfloat16, torch.float16) else 1e-3
    return bool((got - expected).abs().max() <= tolerance * expected.abs().max())
