"""Find layers that a model does not call, though it reads their weight: an adapter around them would do nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel


def passed_by(model: PreTrainedModel, layers: Mapping[str, nn.Module]) -> set[str]:
    """Layers whose weight a forward depends on without calling them.

    A forward of a few tokens shows which layers are not called. Those of experts that no token is sent to are not
    called either, but then the output does not depend on their weight.

    Args:
        model: in evaluation meanwhile.
        layers: by path.

    Returns:
        Paths.
    """
    if model.device.type == "meta":
        return set()
    called = set[int]()
    hooks = [layer.register_forward_hook(lambda layer, *_: called.add(id(layer))) for layer in layers.values()]
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            _output(model)
        weights: dict[str, Any] = {path: layer.weight for path, layer in layers.items() if id(layer) not in called}
        return _matter(model, weights) if weights else set()
    except (TypeError, ValueError, RuntimeError):  # a model that wants more than ids: nothing is known of it
        return set()
    finally:
        for hook in hooks:
            hook.remove()
        for module in training:
            module.training = True


def _matter(model: PreTrainedModel, weights: Mapping[str, Any]) -> set[str]:
    """Which weights the output depends on."""
    before = [weight.requires_grad for weight in weights.values()]
    try:
        for weight in weights.values():
            weight.requires_grad_(True)
        with torch.enable_grad():
            gradients = torch.autograd.grad(_output(model), list(weights.values()), allow_unused=True)
    finally:
        for weight, trained in zip(weights.values(), before, strict=True):
            weight.requires_grad_(trained)
    return {path for path, gradient in zip(weights, gradients, strict=True) if gradient is not None and gradient.any()}


def _output(model: Any) -> torch.Tensor:
    vocabulary = int(model.config.get_text_config().vocab_size)
    ids = torch.tensor([[(37 * i + 11) % vocabulary for i in range(6)]], device=model.device)
    total: torch.Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits.sum()
    return total
