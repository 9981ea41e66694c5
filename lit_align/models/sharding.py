"""Models in slices, one to a process (FSDP2): a layer is gathered when it computes, and let go again."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from lit_align.models.trees import TreeModel

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def shard(model: TreeModel, mesh: DeviceMesh) -> None:
    """Spread a model's weights, gradients and optimizer state over processes.

    Each decoder block is a group of its own, and so is the rest (embeddings, last norm, head). The rest is gathered
    while the forward of `model` itself runs, so what looks at the head's weight directly looks at all of it there.

    Args:
        model: its parameters become slices, on the device of the mesh.
        mesh: of one dimension.

    Raises:
        ValueError: how often the model's blocks run depends on the lengths of a batch, which differ between processes:
            those that run fewer would wait for the others for ever.
    """
    if not model.pads or model.switch is not None:
        raise ValueError(
            f"{type(model.hf).__name__} computes sequences of different length apart, which fsdp2 cannot do: its "
            "processes would wait for each other; use strategy ddp"
        )
    names = set(model.hf._no_split_modules or ())
    blocks = [module for module in model.hf.modules() if type(module).__name__ in names]
    if not blocks:
        warnings.warn(
            f"{type(model.hf).__name__} names no blocks: every process gathers the whole of it at once", stacklevel=2
        )
    for block in blocks:
        fully_shard(block, mesh=mesh)
    # What is trained is gathered again at once, for backward: it may stay. What is frozen would stay for ever.
    trains = any(parameter.requires_grad for parameter in model.parameters())
    fully_shard(model, mesh=mesh, reshard_after_forward=None if trains else True)


def is_sharded(model: nn.Module) -> bool:
    """Whether a model lies in slices."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def whole(tensor: Tensor) -> Tensor:
    """A tensor itself, or all of one that lies in slices: every process must ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def here(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
