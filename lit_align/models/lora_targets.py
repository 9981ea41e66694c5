"""Find the layers and the experts that `lora.targets` names, and report what is not reached."""

from __future__ import annotations

import difflib
import re
import warnings
from typing import Any

from lightning.pytorch.utilities import rank_zero_info
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lit_align.models.called import passed_by

ALL_LINEAR = "all-linear"
# Layers that peft can put an adapter around.
LAYERS = (nn.Linear, Conv1D, nn.Embedding, nn.Conv1d, nn.Conv2d)
# Layers that fused kernels of GPUs read past the adapter: peft refuses them.
FUSED = dict.fromkeys(("mamba", "falcon_mamba", "mamba2", "falcon_h1", "nemotron_h"), ("out_proj", "conv1d"))


def resolve_targets(model: PreTrainedModel, targets: list[str]) -> tuple[list[str], list[str]]:
    """The layers and the parameters that names stand for.

    A name is that of a layer (`q_proj`), of a parameter that lies in no layer, as experts of a mixture do
    (`experts.gate_up_proj`), or of a module with such parameters (`experts`). all-linear is every linear layer but the
    head.

    Args:
        model: may have adapters already.
        targets: names, as `Lora.targets`.

    Returns:
        Names of layers, sorted; and of parameters, with that of their module, sorted.

    Raises:
        ValueError: a name is not in the model.
    """
    layers = {_path(path): layer for path, layer in model.named_modules() if _is_layer(path, layer)}
    past = {path.rpartition(".")[2] for path in passed_by(model, layers)} | {*FUSED.get(model.config.model_type, ())}
    if (left_out := past & _all_linear(model, layers)) and ALL_LINEAR in targets:
        rank_zero_info(
            f"lora.targets: {ALL_LINEAR} leaves out {', '.join(sorted(left_out))}: {type(model).__name__} reads the "
            "weight itself, past any adapter"
        )
    layers = {path: layer for path, layer in layers.items() if path.rpartition(".")[2] not in past}
    loose = loose_parameters(model)
    modules, parameters = set[str](), set[str]()
    for target in targets:
        if target == ALL_LINEAR:
            modules |= _all_linear(model, layers)
            continue
        experts = {name for path, name in loose.items() if ends(path, target) or ends(path.rpartition(".")[0], target)}
        parameters |= experts
        if any(ends(path, target) for path in layers):
            modules.add(target)
        elif not experts:
            known = sorted({path.rpartition(".")[2] for path in layers} | set(loose.values()))
            near = difflib.get_close_matches(target, known, 1)
            if target in past:
                raise ValueError(
                    f"lora.targets: {type(model).__name__} reads the weight of {target} itself, past any adapter: take "
                    "the name out"
                )
            raise ValueError(
                f"lora.targets: {type(model).__name__} has no layer named {target!r}"
                f"{f', did you mean {near[0]!r}?' if near else ''}; it has {', '.join(known)}"
            )
    left = sorted(set(loose.values()) - parameters)
    if ALL_LINEAR in targets and left:
        whole = sum(parameter.numel() for parameter in model.parameters())
        share = sum(p.numel() for path, p in _named_loose(model).items() if loose[path] in left) / whole
        warnings.warn(
            f"lora.targets: {ALL_LINEAR} does not reach the experts ({', '.join(left)}), {share:.0%} of the weights: "
            f"to adapt them too, write targets: [{ALL_LINEAR}, {left[0].partition('.')[0]}]",
            stacklevel=2,
        )
    return sorted(modules), sorted(parameters)


def check_names(model: nn.Module, names: list[str], option: str) -> None:
    """Refuse names that no module or parameter ends with.

    Raises:
        ValueError: names the option and the name.
    """
    paths = [_path(path) for path, _ in [*model.named_modules(), *model.named_parameters()]]
    for name in names:
        if not any(ends(path, name) for path in paths):
            known = sorted({path.rpartition(".")[2] for path in paths if path})
            near = difflib.get_close_matches(name, known, 1)
            raise ValueError(
                f"lora.{option}: {type(model).__name__} has no module named {name!r}"
                f"{f', did you mean {near[0]!r}?' if near else ''}"
            )


def tied_embeddings(model: PreTrainedModel, names: list[str]) -> list[str]:
    """Paths of input and output embeddings that share one weight, if one of them is among the names; else none."""
    both = model.get_input_embeddings(), model.get_output_embeddings()
    if both[1] is None or getattr(both[0], "weight", None) is not getattr(both[1], "weight", 0):
        return []
    paths = [path for path, module in model.named_modules() if any(module is end for end in both)]
    return paths if any(ends(path, name) for path in paths for name in names) else []


def loose_parameters(model: nn.Module) -> dict[str, str]:
    """Three-dimensional parameters that lie in no layer, as experts do: by path, the name with that of the module."""
    return {path: ".".join(path.split(".")[-2:]) for path in _named_loose(model)}


def _named_loose(model: nn.Module) -> dict[str, nn.Parameter]:
    owners = dict[str, Any](model.named_modules())
    return {
        _path(path): parameter
        for path, parameter in model.named_parameters()
        if parameter.dim() == 3 and ".lora_" not in path and not isinstance(owners[path.rpartition(".")[0]], LAYERS)
    }


def _all_linear(model: PreTrainedModel, layers: dict[str, nn.Module]) -> set[str]:
    """Names of the linear layers, without the head."""
    head: Any = getattr(model, "score", None) or model.get_output_embeddings()
    head = getattr(head, "base_layer", head)
    return {
        path.rpartition(".")[2]
        for path, layer in layers.items()
        if isinstance(layer, (nn.Linear, Conv1D)) and layer is not head
    }


def _is_layer(path: str, layer: nn.Module) -> bool:
    """Whether an adapter can be put around a module, which is none of an adapter itself."""
    return isinstance(layer, LAYERS) and ".lora_" not in path


def _path(path: str) -> str:
    """Without peft's names for what lies below an adapter."""
    return re.sub(r"\.base_layer(?=\.|$)", "", path)


def ends(path: str, name: str) -> bool:
    """Whether a path ends with a name, or is it."""
    return path == name or path.endswith(f".{name}")
