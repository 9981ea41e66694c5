"""The keys and values of decoding, in room that is made ahead.

Share of a training step that this saves (experiments/bench/kernels.py): not measured.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer

# What a forward calls its cache: transformers from 5.24 on, before that, and recurrent models before that.
CACHE_ARGUMENTS = ("cache", "past_key_values", "cache_params")

ROOM = 32  # tokens that are made room for at a time


class RoomyLayer(DynamicLayer):
    """A layer of transformers' cache that writes a token's key and value beside the others.

    transformers' own concatenates: every token copies those of all tokens before it.
    """

    keys: Any
    values: Any
    _room: tuple[Tensor, Tensor] | None = None  # of shape (B, heads, room, head size); `keys`, `values` are its front

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add tokens; returns the keys and values of all."""
        if not self.is_initialized or not self.keys.numel():
            self.lazy_initialization(key_states, value_states)
            # Each in its own precision: under autocast rotated keys are in fp32 and values are not.
            self.keys, self.values = key_states, value_states
            return key_states, value_states
        before, after = self.keys.shape[2], self.keys.shape[2] + key_states.shape[2]
        if self._room is None or self._room[0].shape[2] < after:
            self._room = _roomy(self.keys, after + ROOM), _roomy(self.values, after + ROOM)
        for room, states in zip(self._room, (key_states, value_states), strict=True):
            room[:, :, before:after] = states
        self.keys, self.values = (room[:, :, :after] for room in self._room)
        return self.keys, self.values

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every sequence `repeats` times."""
        super().batch_repeat_interleave(repeats)
        self._room = None

    def batch_select_indices(self, indices: Tensor) -> None:
        """Some of the sequences, with their room."""
        if self._room is None:
            super().batch_select_indices(indices)
            return
        length = self.keys.shape[2]
        self._room = self._room[0].index_select(0, indices), self._room[1].index_select(0, indices)
        self.keys, self.values = (room[:, :, :length] for room in self._room)


def _roomy(states: Tensor, room: int) -> Tensor:
    """States of shape (B, heads, T, head size) at the front of a tensor with room for more."""
    roomy = states.new_empty(*states.shape[:2], room, states.shape[3])
    roomy[:, :, : states.shape[2]] = states
    return roomy


def roomy_cache(config: PreTrainedConfig) -> DynamicCache:
    """A cache for a model; layers of another kind (sliding windows, recurrent states) are transformers' own."""
    cache = DynamicCache(config=config)
    cache.layers = [RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def cache_argument(model: nn.Module) -> str:
    """Name the argument in which a model's forward takes its cache.

    The signature decides, not the version of transformers: a name that a forward only swallows in `**kwargs` would be
    ignored, and each token would then be predicted from the token before it alone.

    Raises:
        ValueError: the forward names no such argument.
    """
    parameters = inspect.signature(model.forward).parameters
    for name in CACHE_ARGUMENTS:
        if name in parameters:
            return name
    raise ValueError(
        f"{type(model).__name__}.forward takes no cache (none of {', '.join(CACHE_ARGUMENTS)}): it cannot decode here"
    )
