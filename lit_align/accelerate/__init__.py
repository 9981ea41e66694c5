"""Kernels for CPUs, put on the layers of one model: no class and no function of another library is changed.

Each computes what the layer computes, which a probe checks before it is put there. It keeps its place by what it gains
in a training step of a model of 135 million parameters: `experiments/bench/kernels.py` measures that, and a test holds
the figures in each file to its results.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, Literal, get_args

from transformers import PreTrainedModel

from lit_align.accelerate.norm import put_off_norm, put_on_norm
from lit_align.accelerate.rotary import put_off_rotary, put_on_rotary
from lit_align.accelerate.tree_attention import put_off_tree_attention, put_on_tree_attention

Kernel = Literal["norm", "rotary", "last_layer", "tree_attention"]
KERNELS: tuple[Kernel, ...] = get_args(Kernel)

# What puts a kernel on a model, and what takes it off. The last layer is cut when the model is called.
_SWITCHES: dict[Kernel, tuple[Callable[[Any], None], Callable[[Any], None]]] = {
    "norm": (put_on_norm, put_off_norm),
    "rotary": (put_on_rotary, put_off_rotary),
    "tree_attention": (put_on_tree_attention, put_off_tree_attention),
}


def accelerate(model: PreTrainedModel, kernels: Collection[Kernel] = KERNELS) -> None:
    """Put these kernels on a model's layers, where they compute the same, and take off all others."""
    chosen: Any = model
    chosen.kernels = frozenset(kernels)
    for name, (put_on, put_off) in _SWITCHES.items():
        (put_on if name in kernels else put_off)(model)


def kernels_of(model: PreTrainedModel) -> frozenset[Kernel]:
    """The kernels that `accelerate` chose for a model; all for a model that it has not seen."""
    return getattr(model, "kernels", frozenset(KERNELS))
