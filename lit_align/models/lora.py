"""Low-rank adapters, injected by peft into the transformers model itself: no wrapper class around it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lit_align.models.network import Lora
from lit_align.models.sharding import is_sharded, whole

ADAPTER = "lit_align"


def add_lora(model: PreTrainedModel, lora: Lora) -> None:
    """Inject adapters into a model and freeze everything else, a scalar head (`score`) excepted."""
    head = getattr(model, "score", None) or model.get_output_embeddings()
    layers = {
        name.rpartition(".")[-1]: module
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and module is not head
    }
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=sorted(layers) if lora.targets == ["all-linear"] else lora.targets,
        fan_in_fan_out=any(isinstance(layer, Conv1D) for layer in layers.values()),
    )
    model.add_adapter(config, adapter_name=ADAPTER)
    if getattr(model, "score", None) is not None:
        head.requires_grad_(True)


def has_lora(model: nn.Module) -> bool:
    """Whether adapters were injected."""
    return any(isinstance(module, BaseTunerLayer) for module in model.modules())


@contextlib.contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """The model as it was before training: adapters are skipped. The reference of a policy trained with LoRA."""
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def merged_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The weights with every adapter folded in, under the names that the model has without adapters.

    Nothing is merged in place: adding an update to a weight and subtracting it again does not give the weight back.

    Returns:
        By name; of a model in slices whole weights, on the CPU of the first process, and nothing on the others.
    """
    adapted = {f"{name}.weight": layer for name, layer in model.named_modules() if isinstance(layer, BaseTunerLayer)}
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
