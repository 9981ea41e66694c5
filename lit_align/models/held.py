"""A model that was given as an object, from Python, in place of a name."""

from __future__ import annotations

import copy
from typing import Any

from torch import dtype, nn
from transformers import AutoModelForCausalLM, PreTrainedModel


def held_model(name: str) -> PreTrainedModel | None:
    """The object that a network's name stands for; None for an ordinary name. See `ModelName`."""
    return getattr(name, "model", None)


def copied(given: PreTrainedModel, auto_class: Any, kind: dtype, options: dict[str, Any]) -> tuple[Any, list[str]]:
    """A copy of a model, as a language model or with a scalar head; and the names of weights that are new.

    Args:
        given: stays as it is.
        auto_class: transformers' class for the task.
        kind: dtype of the copy.
        options: of its configuration.

    Raises:
        ValueError: it is of another kind.
    """
    name = type(given).__name__
    if not isinstance(given, PreTrainedModel):
        raise ValueError(f"{name} is no model of transformers: give its base model, and adapters by network.lora")
    if auto_class is AutoModelForCausalLM:
        if given.get_output_embeddings() is None:
            raise ValueError(f"{name} has no vocabulary head: give a model for causal language modelling")
        return _copy(given, kind), []
    if hasattr(given, "score"):
        if given.config.num_labels != 1:
            raise ValueError(f"{name} has {given.config.num_labels} labels, expected one: a scalar head")
        return _copy(given, kind), []
    config = copy.deepcopy(given.config)
    config.update(options)
    model = auto_class.from_config(config, dtype=kind)
    model.base_model.load_state_dict(given.base_model.state_dict())
    return model, ["score.weight"]


def _copy(given: nn.Module, kind: dtype) -> nn.Module:
    return copy.deepcopy(given).to(kind)


def set_dropout(model: nn.Module, rate: float) -> None:
    """Set the dropout of a model that is built already: of its layers, and rates that modules keep for attention."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = rate
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):
                setattr(module, name, rate)
