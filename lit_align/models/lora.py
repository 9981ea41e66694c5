"""Low-rank adapters, injected by peft into the transformers model itself: no wrapper class around it.

Adapters go by names: those of the model itself by `ADAPTER`, and those of further roles on its backbone by the role's.
"""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lit_align.models.network import Lora
from lit_align.models.sharding import is_sharded, whole

ADAPTER = "lit_align"


def add_lora(model: PreTrainedModel, lora: Lora, name: str = ADAPTER) -> None:
    """Inject adapters into a model and freeze everything else, a scalar head (`score`) excepted.

    Args:
        model: may have adapters of another name, which stay as they are.
        lora: rank, scale and place.
        name: of these adapters.
    """
    head = getattr(model, "score", None) or model.get_output_embeddings()
    layers = {
        path.removesuffix(".base_layer").rpartition(".")[-1]: module
        for path, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and module is not head and ".lora_" not in path
    }
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=sorted(layers) if lora.targets == ["all-linear"] else lora.targets,
        fan_in_fan_out=any(isinstance(layer, Conv1D) for layer in layers.values()),
    )
    add_adapter(model, config, name)
    if getattr(model, "score", None) is not None:
        head.requires_grad_(True)


def add_adapter(model: PreTrainedModel, config: LoraConfig, name: str) -> None:
    """Inject adapters, of which the first to come stays the one in use."""
    others = [(p, p.requires_grad) for p in model.parameters()] if has_lora(model) else []
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # which is what is wanted
        model.add_adapter(config, adapter_name=name)
    if others:
        model.set_adapter(ADAPTER)
        for parameter in adapter_parameters(model, name):
            parameter.requires_grad_(True)
        for parameter, trained in others:
            parameter.requires_grad_(trained)


def adapter_parameters(model: nn.Module, name: str) -> list[nn.Parameter]:
    """The weights of the adapters of a name."""
    return [parameter for key, parameter in model.named_parameters() if adapter_role(key) == name]


def adapter_role(name: str) -> str | None:
    """Whose adapter a parameter of this name belongs to; None for the model's own, and for what is no adapter."""
    role = re.search(r"\.lora_\w+\.(\w+)", name)
    return role[1] if role is not None and role[1] != ADAPTER else None


def has_lora(model: nn.Module) -> bool:
    """Whether adapters were injected."""
    return any(isinstance(module, BaseTunerLayer) for module in model.modules())


def adapters_off(model: nn.Module) -> AbstractContextManager[None]:
    """The model as it was before training: adapters are skipped. The reference of a policy trained with LoRA."""
    return _using(model, None)


def adapter_on(model: nn.Module, name: str) -> AbstractContextManager[None]:
    """The model with the adapters of another name in use."""
    return _using(model, [name])


@contextlib.contextmanager
def _using(model: nn.Module, names: list[str] | None) -> Iterator[None]:
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    before = [(layer.disable_adapters, layer.active_adapters) for layer in layers]
    for layer in layers:
        # Not by enable_adapters and set_adapter: they freeze what is put aside, and thaw what was frozen.
        layer._disable_adapters, layer._active_adapter = names is None, names or layer.active_adapters
    try:
        yield
    finally:
        for layer, (off, active) in zip(layers, before, strict=True):
            layer._disable_adapters, layer._active_adapter = off, active


@contextlib.contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """A model in training that is asked as one that is not."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def same_adapters(model: nn.Module) -> Callable[[], tuple[Any, Any]]:
    """For activation checkpointing: what is computed again in backward has the adapters that it had the first time.

    By the time of backward another role may be at work, and its adapters would be differentiated, silently.
    """

    def contexts() -> tuple[Any, Any]:
        layer = next(module for module in model.modules() if isinstance(module, BaseTunerLayer))
        return contextlib.nullcontext(), _using(model, None if layer.disable_adapters else layer.active_adapters)

    return contexts


def merged_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The weights with every adapter folded in, under the names that the model has without adapters.

    Nothing is merged in place: adding an update to a weight and subtracting it again does not give the weight back.

    Returns:
        By name; of a model in slices whole weights, on the CPU of the first process, and nothing on the others.
    """
    adapted = {
        f"{name}.weight": layer
        for name, layer in model.named_modules()
        if isinstance(layer, BaseTunerLayer) and ADAPTER in layer.lora_A  # type: ignore[attr-defined]
    }
    sliced, state = is_sharded(model), {}
    for name, weight in model.state_dict().items():
        if ".lora_" in name:
            continue
        name = name.replace(".base_layer.", ".")
        weight = weight.detach()
        if name in adapted:
            update: Tensor = adapted[name].get_delta_weight(ADAPTER)  # type: ignore[attr-defined]
            weight = weight + update.to(weight)
        if sliced:
            weight = whole(weight)  # one at a time: together they may not fit
            if torch.distributed.get_rank():
                continue
            weight = weight.cpu()
        state[name] = weight
    return state
