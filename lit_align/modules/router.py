"""The load-balancing loss of a mixture of experts, added to a method's own."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lit_align.models.experts import RouterLoss, recorded_router, router_loss, token_weights
from lit_align.models.trees import TreeModel


def find_router_loss(model: TreeModel, weight: float | None, method: str | None = None) -> RouterLoss | None:
    """The load-balancing loss of the model that a run trains; see `router_loss`.

    Args:
        model: the model.
        weight: `Network.router_loss`.
        method: name of a method that cannot add it.

    Raises:
        ValueError: it cannot be added; says what to set.
    """
    loss = router_loss(model, weight)
    if loss is not None and method is not None:
        raise ValueError(
            f"{method} adds no load-balancing loss, and the model asks for one (output_router_logits: true, or "
            "network.router_loss): set network.router_loss: 0"
        )
    return loss


def micro_step_with_router(module: Any, batch: Any) -> Tensor:
    """A method's loss of a micro-batch, and that of the router times the same count.

    The router's loss is a product of two means over the tokens of a micro-batch, not a sum over tokens. Micro-batches
    therefore count by what the method's loss counts, and the step's loss is the weighted mean over them.

    Args:
        module: an `AlignModule` with `micro_step`; its sums get `router_loss`, and `loss` holds both.
        batch: as `micro_step` takes it.

    Returns:
        The sum that is divided by the count of the whole step later.
    """
    loss: RouterLoss | None = getattr(module, "router_loss", None)
    if loss is None:
        plain: Tensor = module.micro_step(batch)
        return plain
    model = module.policy if hasattr(module, "policy") else module.scorer
    _, before = module._sums.get("loss", (0.0, 0))
    with recorded_router(model) as found:
        total = module.micro_step(batch)
    if len(found) != 1:
        raise RuntimeError(f"{len(found)} forwards with gradient in a micro-batch, of which one was expected")
    count = module._sums["loss"][1] - before
    balance = loss(found[0], token_weights(model, getattr(batch, "packed", batch))) * count
    module.accumulate(balance, 0, router_loss=(balance, count))
    return total + balance.to(total)
