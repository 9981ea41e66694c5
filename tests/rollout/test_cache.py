"""The cache with room: what transformers' own holds, whatever is done to it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers.cache_utils import DynamicLayer

from lit_align.rollout.cache import ROOM, RoomyLayer, cache_argument


def test_the_signature_names_the_cache_whatever_the_version() -> None:
    class Newer(nn.Module):
        def forward(self, input_ids: Any, cache: Any = None, **kwargs: Any) -> Any: ...

    class Older(nn.Module):
        def forward(self, input_ids: Any, past_key_values: Any = None, **kwargs: Any) -> Any: ...

    class Recurrent(nn.Module):
        def forward(self, input_ids: Any, cache_params: Any = None, **kwargs: Any) -> Any: ...

    assert [cache_argument(c()) for c in (Newer, Older, Recurrent)] == ["cache", "past_key_values", "cache_params"]


def test_a_forward_that_would_swallow_the_cache_is_refused() -> None:
    class Swallows(nn.Module):
        def forward(self, input_ids: Any, **kwargs: Any) -> Any: ...

    with pytest.raises(ValueError, match=r"Swallows\.forward takes no cache"):
        cache_argument(Swallows())


def test_it_holds_what_a_growing_cache_holds() -> None:
    torch.manual_seed(0)
    roomy, growing = RoomyLayer(), DynamicLayer()

    def add(sequences: int, tokens: int) -> None:
        keys, values = torch.randn(2, sequences, 3, tokens, 4).unbind()
        for got, expected in zip(roomy.update(keys, values), growing.update(keys, values), strict=True):
            assert torch.equal(got, expected)
        assert roomy.get_seq_length() == growing.get_seq_length()

    add(4, 5)
    for _ in range(ROOM + 3):
        add(4, 1)
    for layer in (roomy, growing):
        layer.batch_select_indices(torch.tensor([0, 3]))
    add(2, 1)
    for layer in (roomy, growing):
        layer.batch_repeat_interleave(3)
    add(6, 2)
    for layer in (roomy, growing):
        layer.batch_select_indices(torch.tensor([5, 1]))
    add(2, 1)
    assert torch.equal(roomy.keys, growing.keys)
