"""What training will hold in memory, what it held, and what to lower when it does not fit."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.optim import Optimizer

from lit_align.models.lora import adapter_role
from lit_align.models.sharding import here

if sys.platform != "win32":
    import resource

MIB = 2**20


class OutOfMemory(MemoryError):
    """There was not enough of it; the message says where, for how much work, and which option to lower."""


class RoleMemory(NamedTuple):
    """What a role (policy, reference, value, reward) holds before any activation, in bytes.

    Attributes:
        role: name of the module's child.
        parameters: how many; those of an earlier role, shared with it, are not counted again.
        trained: how many of them are trained.
        weights: bytes of all of them.
        training: bytes of the gradients and of the optimizer's state.
    """

    role: str
    parameters: int
    trained: int
    weights: int
    training: int

    def __str__(self) -> str:
        trains = (
            f" + {self.training / MIB:,.0f} for training {self.trained / 1e6:,.2f} M" if self.trained else ", frozen"
        )
        return f"{self.role} {self.parameters / 1e6:,.2f} M parameters, {self.weights / MIB:,.0f} MiB{trains}"


def memory_budget(
    module: nn.Module, optimizers: Collection[Optimizer], gradients_in_slices: bool = False
) -> list[RoleMemory]:
    """What each role of a module holds while it is trained.

    Args:
        module: its children are the roles; adapters that one has on the backbone of another are its own.
        optimizers: whose state is counted; see `state_numbers`. What they step on that is not the module's (ZeRO's
            slices of its weights) is a role of its own.
        gradients_in_slices: the gradients are that role's alone, as in ZeRO's stage 2: no other keeps a whole one.
    """
    states = {
        id(parameter): state_numbers(optimizer, group)
        for optimizer in optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    seen: set[int] = set()
    of_role: dict[str, list[nn.Parameter]] = {}
    for child_name, child in module.named_children():
        for name, parameter in child.named_parameters():
            if id(parameter) not in seen:
                seen.add(id(parameter))
                of_role.setdefault(adapter_role(name) or child_name, []).append(parameter)
    roles = []
    for role, own in of_role.items():
        trained = [parameter for parameter in own if parameter.requires_grad]
        gradient = 0 if gradients_in_slices else 1
        training = sum(_bytes(parameter) * (gradient + states.get(id(parameter), 0)) for parameter in trained)
        counts = sum(p.numel() for p in own), sum(p.numel() for p in trained)
        roles.append(RoleMemory(role, *counts, sum(map(_bytes, own)), training))
    stepped = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    if slices := [p for p in stepped if id(p) not in seen]:
        count, training = sum(p.numel() for p in slices), sum(_bytes(p) * (1 + states[id(p)]) for p in slices)
        roles.append(RoleMemory("optimizer's slices", count, count, sum(map(_bytes, slices)), training))
    return roles


def state_numbers(optimizer: Optimizer, group: Mapping[str, Any]) -> int:
    """Numbers that an optimizer keeps of each parameter of a group; 0 where its kind is not known.

    Adafactor keeps those of a row and a column of each matrix, which are few: it counts as 0.
    """
    name = type(optimizer).__name__.lower()
    if "adam" in name or name in ("adadelta", "lamb", "rprop"):
        return 2 + bool(group.get("amsgrad"))
    momentum = bool(group.get("momentum"))
    if name in ("rmsprop", "adagrad"):
        return 1 + momentum + bool(group.get("centered"))
    return int(momentum or name in ("lion", "asgd"))


def _bytes(parameter: torch.Tensor) -> int:
    return here(parameter).numel() * parameter.element_size()


def peak_memory(device: torch.device) -> int:
    """The most that was held at once, in bytes: allocated on a GPU, otherwise resident in this process.

    0 on Windows, which does not tell in this way.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return 0
    # Kilobytes, but on macOS, where they are bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def keep_freed_memory() -> bool:
    """Let the C library keep what tensors free, for the next ones, in place of giving it back to the system.

    By default glibc maps every tensor above some size anew, and the system then fills it with zeros, page by page: a
    quarter of a training step on a CPU. What MALLOC_MMAP_MAX_ and MALLOC_TRIM_THRESHOLD_ say in the environment goes
    first.

    Returns:
        Whether it will; False where the C library is another one.
    """
    if sys.platform == "win32":
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        return False
    for variable, parameter, value in (("MALLOC_TRIM_THRESHOLD_", -1, 2**31 - 1), ("MALLOC_MMAP_MAX_", -4, 0)):
        if variable not in os.environ:
            libc.mallopt(parameter, value)
    return True


@contextlib.contextmanager
def memory_for(doing: str, lower: str) -> Iterator[None]:
    """Say of an allocation that fails what it was for.

    Args:
        doing: phase and amount of work, as in "the backward of a micro-batch of 8,192 tokens".
        lower: the option to lower.

    Raises:
        OutOfMemory: in place of torch's error.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        # On a CPU torch has no type for it.
        if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error):
            if isinstance(error, OutOfMemory):
                raise
            raise OutOfMemory(f"out of memory in {doing}: lower {lower} ({str(error).splitlines()[0]})") from error
        raise
