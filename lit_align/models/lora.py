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

from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lit_align.models.lora_targets import check_names, ends, resolve_targets, tied_embeddings
from lit_align.models.network import INITS, Lora
from lit_align.utils.versions import tested_together

ADAPTER = "lit_align"


def add_lora(model: PreTrainedModel, lora: Lora, name: str = ADAPTER) -> None:
    """Inject adapters into a model and freeze everything else, a scalar head (`score`) excepted.

    Args:
        model: may have adapters of another name, which stay as they are.
        lora: rank, scale and place.
        name: of these adapters.
    """
    modules, parameters = resolve_targets(model, lora.targets)
    for key in ("dropout", "dora"):
        if parameters and getattr(lora, key):
            raise ValueError(f"lora.{key}: {getattr(lora, key)} does not reach {parameters[0]}: set it to 0 or false")
    check_names(model, lora.modules_to_save, "modules_to_save")
    for key in ("rank_pattern", "alpha_pattern"):
        check_names(model, list(getattr(lora, key)), key)
    tied = tied_embeddings(model, lora.modules_to_save)
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=modules,
        target_parameters=parameters or None,
        use_rslora=lora.rslora,
        use_dora=lora.dora,
        init_lora_weights=INITS[lora.init],
        modules_to_save=[*(name for name in lora.modules_to_save if not any(ends(t, name) for t in tied)), *tied]
        or None,
        rank_pattern=dict(lora.rank_pattern),
        alpha_pattern=dict(lora.alpha_pattern),
        ensure_weight_tying=bool(tied),
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
    )
    add_adapter(model, config, name)
    if getattr(model, "score", None) is not None:
        model.score.requires_grad_(True)


def add_adapter(model: PreTrainedModel, config: LoraConfig, name: str) -> None:
    """Inject adapters, of which the first to come stays the one in use."""
    others = [(p, p.requires_grad) for p in model.parameters()] if has_lora(model) else []
    with peft_warnings_off():
        if others:
            # Not transformers' add_adapter: it would switch what is trained whole to adapters that have no copy of it.
            config.base_model_name_or_path = model.name_or_path
            inject_adapter_in_model(config, model, name)
        else:
            try:
                model.add_adapter(config, adapter_name=name)
            except (ImportError, ValueError) as error:
                if "version of PEFT" not in str(error):
                    raise
                raise ValueError(
                    f"lora: {' '.join(str(error).split())}; {tested_together('peft', 'transformers')}"
                ) from error
    if others:
        model.set_adapter(ADAPTER)
        for parameter in adapter_parameters(model, name):
            parameter.requires_grad_(True)
        for parameter, trained in others:
            parameter.requires_grad_(trained)


@contextlib.contextmanager
def peft_warnings_off() -> Iterator[None]:
    """Without peft's warnings about what is handled here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several roles have adapters
        # Tied embeddings that adapters make differ are exported untied.
        warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`")
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to")  # peft mends it layer by layer
        yield


def adapter_parameters(model: nn.Module, name: str) -> list[nn.Parameter]:
    """The weights of the adapters of a name."""
    return [parameter for key, parameter in model.named_parameters() if adapter_role(key) == name]


def adapter_role(name: str) -> str | None:
    """Whose adapter a parameter of this name belongs to; None for the model's own, and for what is no adapter."""
    role = re.search(r"\.lora_\w+\.(\w+)", name)
    return role[1] if role is not None and role[1] != ADAPTER else None


def is_adapter_weight(name: str) -> bool:
    """Whether a weight of this name belongs to an adapter, whoever's it is, and not to the model below."""
    return ".lora_" in name or ".modules_to_save." in name


def plain_name(name: str) -> str:
    """The name that a weight has in the model without adapters."""
    return re.sub(rf"\.(base_layer|original_module|modules_to_save\.{ADAPTER})(?=\.)", "", name)


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
    layers = [module for module in model.modules() if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))]
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
    """Switch to eval mode (no dropout) inside the block."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def same_adapters(model: nn.Module) -> Callable[[], tuple[Any, Any]]:
    """For activation checkpointing: recompute with the adapters that were active in the forward.

    By the time of backward another role may be at work, and its adapters would be differentiated, silently.
    """

    def contexts() -> tuple[Any, Any]:
        layer = next(module for module in model.modules() if isinstance(module, BaseTunerLayer))
        return contextlib.nullcontext(), _using(model, None if layer.disable_adapters else layer.active_adapters)

    return contexts
