"""Fold adapters into the weights below them, and check that nothing of an adapter is left out."""

from __future__ import annotations

import copy
import re

import torch
from peft.tuners.lora import LoraLayer, ParamWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from lit_align.models.lora import ADAPTER, is_adapter_weight, plain_name
from lit_align.models.sharding import is_sharded, whole


def merged_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The weights with every adapter folded in, under the names that the model has without adapters.

    Nothing is merged in place: adding an update to a weight and subtracting it again does not give the weight back.

    Returns:
        By name; of a model in slices whole weights, on the CPU of the first process, and nothing on the others.

    Raises:
        ValueError: a trained weight of an adapter has no place in the merged weights.
    """
    adapted = {name: layer for name, layer in model.named_modules() if _adapts(layer)}
    layers = {_adapted_weight(name, layer): layer for name, layer in adapted.items()}
    trained, sliced = model.state_dict(), is_sharded(model)
    copies = {plain_name(name): weight for name, weight in trained.items() if f".modules_to_save.{ADAPTER}." in name}
    lost = [
        n for n in trained if _of_adapter(n) and plain_name(n) not in copies and n.split(".lora_")[0] not in adapted
    ]
    if lost := lost or sorted(layers.keys() - {plain_name(name) for name in trained}):
        raise ValueError(f"{lost[0]} cannot be merged into the model: export with `lora: {{export: adapter}}`")
    state: dict[str, Tensor] = {}
    for name, weight in trained.items():
        if is_adapter_weight(name):
            continue
        name = plain_name(name)
        weight = copies.get(name, weight).detach()
        if name in layers:
            weight = _merged(layers[name], weight)
        if sliced:
            weight = whole(weight)  # one at a time: together they may not fit
            if torch.distributed.get_rank():
                continue
            weight = weight.cpu()
        state[name] = weight
    return state


def merged_model(model: PreTrainedModel, state: dict[str, Tensor] | None = None) -> PreTrainedModel:
    """A plain model that holds the merged weights.

    Weights that the architecture ties (input and output embeddings) may differ after the merge: the plain model and
    its configuration are then untied.

    Args:
        model: has adapters.
        state: of `merged_state_dict`, if it was made already.

    Raises:
        ValueError: the architecture cannot hold the merged weights.
    """
    state = merged_state_dict(model) if state is None else state
    config = model.config
    for tied in (True, False):
        if not tied:
            config = copy.deepcopy(config)
            config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False
        with torch.random.fork_rng(devices=[]):  # the random weights are replaced; the run's draws must not change
            plain = type(model)._from_config(config, dtype=model.dtype)
        plain.load_state_dict(state, strict=True)
        held = plain.state_dict()
        differ = [name for name, weight in state.items() if not torch.equal(held[name], weight.to(held[name]))]
        if not differ:
            break
    else:
        raise ValueError(
            f"{type(model).__name__} ties {differ[0]} to another weight, which the adapters have made another one: "
            "export with `lora: {export: adapter}`, or take the name out of lora.targets"
        )
    if model.can_generate():
        plain.generation_config = model.generation_config
    return plain


def parted(model: nn.Module) -> list[str]:
    """Weights that share their values with another one, and that adapters of their own make another weight."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if not is_adapter_weight(name):
            names.setdefault(id(parameter), []).append(plain_name(name))
    shared = {name for same in names.values() if len(same) > 1 for name in same}
    return sorted(shared & {_adapted_weight(name, layer) for name, layer in model.named_modules() if _adapts(layer)})


def _adapts(layer: nn.Module) -> bool:
    """Whether a layer holds an adapter of the model itself, and not only those of other roles."""
    return isinstance(layer, LoraLayer) and ADAPTER in layer.scaling


def _adapted_weight(name: str, layer: nn.Module) -> str:
    """Name of the weight below an adapter, as the model has it without adapters."""
    weight = layer.parameter_name if isinstance(layer, ParamWrapper) else "weight"
    return re.sub(r"\.base_layer(?=\.|$)", "", f"{name}.{weight}")


def _of_adapter(name: str) -> bool:
    """Whether a weight belongs to the adapter of the model itself."""
    return is_adapter_weight(name) and ADAPTER in name.split(".")


def _merged(layer: LoraLayer, weight: Tensor) -> Tensor:
    """A weight with its adapter; DoRA does more than add."""
    if ADAPTER in layer.lora_variant:
        merged: Tensor = layer.lora_variant[ADAPTER].merge_safe(layer, ADAPTER, weight)
        return merged.detach()
    update: Tensor = layer.get_delta_weight(ADAPTER)  # type: ignore[attr-defined]
    return weight + update.detach().to(weight)
