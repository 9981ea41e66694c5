"""The last layer, computed only for tokens whose state is read.

Of a pair of answers a reward model reads two states, and a policy those before each scored token; what the last layer
says of all other tokens goes nowhere. Its keys and values are needed of every token, its queries, attention, output
projection and feed-forward network of those that are read: with six layers and two states read of six hundred, a
seventh of the work.

Share of a training step that this saves (experiments/bench/kernels.py): sft 4.5%.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lit_align.functional.gather_rows import read_rows

# Modules of a layer that look at one token at a time and feed nothing but its own state: Llama and its kin, GPT-NeoX,
# GPT-2. A name that is missing is computed for every token, and costs nothing but time.
PER_TOKEN = ("mlp", "self_attn.q_proj", "self_attn.o_proj", "attention.dense", "attn.c_proj")
# What attends, told of the blocks that a row is cut into if it attends tree by tree.
ATTENTION = ("self_attn", "attention", "attn")


def last_layer(backbone: PreTrainedModel) -> nn.Module | None:
    """The last decoder layer, if the model has a plain list of them."""
    count = backbone.config.get_text_config().num_hidden_layers
    stacks = [child for child in backbone.children() if isinstance(child, nn.ModuleList) and len(child) == count]
    return stacks[0][-1] if len(stacks) == 1 else None


@contextlib.contextmanager
def only_read(backbone: PreTrainedModel, read_S: Tensor, shape: torch.Size) -> Iterator[None]:
    """Within, the last hidden states of tokens outside `read_S` are wrong, and cheaper.

    Args:
        backbone: called within on rows of tokens, shape (R, N).
        read_S: which of these R * N; any may occur twice.
        shape: (R, N).
    """
    layer = last_layer(backbone)
    # Activation checkpointing runs the layer a second time, in backward: by then the hooks are gone.
    if layer is None or getattr(layer, "gradient_checkpointing", False):
        yield
        return
    read_U, (rows, tokens) = read_S.unique(), shape

    def pick(module: nn.Module, inputs: tuple[Tensor]) -> Tensor:
        (states_RNH,) = inputs
        return read_rows(states_RNH.flatten(0, 1), read_U)[None]

    def spread(module: nn.Module, inputs: Any, output_1UH: Tensor) -> Tensor:
        output_MH = output_1UH.new_zeros(rows * tokens, output_1UH.shape[-1])
        return output_MH.index_copy(0, read_U, output_1UH[0]).unflatten(0, (rows, tokens))

    def narrow(module: nn.Module, inputs: Any, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        blocks = options.get("blocks")
        if blocks is None or not len(read_U):
            return inputs, options
        return inputs, {**options, "blocks": blocks.only(read_U)}

    modules = dict(layer.named_modules())
    hooks = [modules[at].register_forward_pre_hook(narrow, with_kwargs=True) for at in ATTENTION if at in modules]
    for name in PER_TOKEN:
        if name in modules:
            hooks += [modules[name].register_forward_pre_hook(pick), modules[name].register_forward_hook(spread)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
