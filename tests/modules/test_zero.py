"""What DeepSpeed's slices refuse. That two processes with them are one: test_processes.py and test_launch.py.

Seen to fail: without the check of each.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.fabric.utilities.imports import RequirementCache
from lightning.pytorch.strategies import StrategyRegistry
from torch import nn
from torch.optim import SGD, Adafactor, Adam, AdamW

from lit_align.modules import ZeROStrategy, zero
from lit_align.modules.zero import check_training


@pytest.mark.parametrize("kind", [SGD, Adam, AdamW])
def test_what_steps_number_by_number_can_be_cut(kind: Any) -> None:
    weights = [nn.Parameter(torch.ones(2))]
    check_training(kind(weights, lr=0.1), weights, clip_algorithm="norm")


@pytest.mark.parametrize(
    ("kind", "dtype", "clip", "says"),
    [
        (Adafactor, torch.float32, None, "Adafactor would see slices .* use AdamW, Adam or SGD"),
        (AdamW, torch.bfloat16, None, "weights in fp32: leave network.dtype"),
        (AdamW, torch.float32, "value", "clip by norm: unset trainer.gradient_clip_algorithm"),
    ],
)
def test_what_cannot_be_cut_says_what_to_use(kind: Any, dtype: torch.dtype, clip: str | None, says: str) -> None:
    weights = [nn.Parameter(torch.ones(2, 2, dtype=dtype))]
    with pytest.raises(ValueError, match=says):
        check_training(kind(weights, lr=0.1), weights, clip)


def test_its_names_are_known() -> None:
    assert {"zero1", "zero2"} <= set(StrategyRegistry.available_strategies())


def test_weights_are_not_sliced() -> None:
    with pytest.raises(ValueError, match="stage must be 1 or 2, got 3: strategy fsdp2 slices weights"):
        ZeROStrategy(stage=3)


def test_without_deepspeed_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zero, "DEEPSPEED", RequirementCache("deepspeed>=99"))
    with pytest.raises(ModuleNotFoundError, match=r"zero2 needs deepspeed>=99: pip install 'lit_align\[deepspeed\]'"):
        StrategyRegistry.get("zero2")
