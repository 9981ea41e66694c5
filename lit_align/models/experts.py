"""The router of a mixture of experts: its load-balancing loss, and its noise.

Source: Fedus et al. 2021, "Switch Transformers", equations 4 to 6, as transformers computes it.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from transformers import PreTrainedModel

from lit_align.functional.packing import unpack
from lit_align.models.trees import TreeModel
from lit_align.types import PackedBatch

# What architectures call it.
_CHOSEN = ("num_experts_per_tok", "moe_k", "moe_top_k", "top_k_experts")
_NOISE = ("jitter_noise", "router_jitter_noise", "input_jitter_noise", "moe_jitter_eps")


class RouterLoss(NamedTuple):
    """How the load-balancing loss of a model is computed.

    Attributes:
        weight: of this loss beside the method's own, which is a mean.
        chosen: experts per token.
        function: transformers' loss of the architecture.
    """

    weight: float
    chosen: int
    function: Callable[..., Tensor]

    def __call__(self, logits: tuple[Tensor, ...], weight_M: Tensor) -> Tensor:
        """The weighted loss of one forward.

        Args:
            logits: of the router of each layer, shape (M, experts).
            weight_M: how often each of the M tokens counts: 0 for padding, and for a prompt that answers share as
                often as there are answers, as if each had a row of its own.
        """
        return self.weight * self.function(logits, logits[0].shape[-1], self.chosen, weight_M)


def router_loss(model: TreeModel, weight: float | None) -> RouterLoss | None:
    """The load-balancing loss that a model is to be trained with.

    Args:
        model: any; only mixtures of experts have a router.
        weight: of the loss; None for that of the model's configuration if it has `output_router_logits: true`, else 0.

    Returns:
        None if there is none.

    Raises:
        ValueError: a weight for a model without such a loss, or for an architecture whose loss is not known.
    """
    hf, config = model.hf, model.hf.config.get_text_config()
    if weight is None:
        weight = getattr(config, "router_aux_loss_coef", None) if getattr(config, "output_router_logits", None) else 0.0
    if weight == 0.0:
        return None
    name, off = type(hf).__name__, "set network.router_loss: 0"
    function = getattr(sys.modules[type(model.backbone).__module__], "load_balancing_loss_func", None)
    chosen = next((getattr(config, key) for key in _CHOSEN if getattr(config, key, None)), None)
    if weight is None or function is None or chosen is None:
        raise ValueError(f"network.router_loss: {name} has no load-balancing loss that is known here: {off}")
    if getattr(model.backbone, "compiled", None) is not None:
        raise ValueError(f"network.router_loss does not reach compiled code: unset network.compile, or {off}")
    loss = RouterLoss(weight, int(chosen), function)
    if not _as_in_transformers(model, loss):
        raise ValueError(f"network.router_loss: {name} computes its load-balancing loss in another way: {off}")
    return loss


@torch.no_grad()
def _as_in_transformers(model: TreeModel, loss: RouterLoss) -> bool:
    """Compare the loss of a few tokens with the model's own; a scalar model has none."""
    hf: Any = model.hf
    if hf.device.type == "meta":
        return True
    vocabulary = int(hf.config.get_text_config().vocab_size)
    ids = torch.tensor([[(37 * i + 11) % vocabulary for i in range(8)]], device=hf.device)
    training = hf.training
    hf.eval()
    try:
        with recorded_router(model, always=True) as found:
            output = hf(input_ids=ids, attention_mask=torch.ones_like(ids), output_router_logits=True, use_cache=False)
    except (TypeError, ValueError):  # no such option
        return False
    finally:
        hf.train(training)
    if len(found) != 1 or not found[0]:
        return False
    expected = getattr(output, "aux_loss", None)
    got = loss(found[0], torch.ones(8, device=hf.device))
    return expected is None or torch.allclose(got.float(), loss.weight * expected.float(), rtol=1e-3)


@contextlib.contextmanager
def recorded_router(model: TreeModel, always: bool = False) -> Iterator[list[tuple[Tensor, ...]]]:
    """Collect the router's logits of each forward with gradient, for every token.

    Args:
        model: the last layer is computed for all tokens meanwhile.
        always: of a forward without gradient too.
    """
    found: list[tuple[Tensor, ...]] = []

    def ask(module: nn.Module, inputs: Any, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return inputs, {**options, "output_router_logits": True} if always or torch.is_grad_enabled() else options

    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        if always or torch.is_grad_enabled():
            found.append(tuple(logits.flatten(0, -2) for logits in output.router_logits or ()))

    hooks = [
        model.backbone.register_forward_pre_hook(ask, with_kwargs=True),
        model.backbone.register_forward_hook(keep),
    ]
    thrifty, model.thrifty = model.thrifty, False
    try:
        yield found
    finally:
        model.thrifty = thrifty
        for hook in hooks:
            hook.remove()


def token_weights(model: TreeModel, batch: PackedBatch) -> Tensor:
    """How often each token of a forward counts, in the layout that the model runs the batch in. Shape (M,)."""
    if not model.packs:
        return (unpack(batch).tree_RN >= 0).float().flatten()
    # Answers of a tree are its branches 1, 2, ...; without branches it is one sequence.
    row_RN = torch.arange(len(batch.tree_RN), device=batch.tree_RN.device)[:, None] * (int(batch.tree_RN.max()) + 1)
    there_RN = batch.tree_RN >= 0
    tree_M = torch.where(there_RN, row_RN + batch.tree_RN, 0).flatten()
    branch_M = batch.branch_RN.flatten()
    answers = torch.zeros(int(tree_M.max()) + 1, dtype=branch_M.dtype, device=branch_M.device)
    answers = answers.scatter_reduce(0, tree_M, torch.where(there_RN.flatten(), branch_M, 0), "amax").clamp(min=1)
    weight_M = torch.where(branch_M == 0, answers[tree_M], 1).float() * there_RN.flatten()
    in_one_row = model.by_tree and batch.tokens_RN.device.type == "cpu"
    return weight_M[there_RN.flatten()] if in_one_row else weight_M


def route_without_noise(model: PreTrainedModel) -> None:
    """Keep the routers of a model as in evaluation, so that two passes over the same tokens agree.

    Some configurations multiply what a router looks at by noise in training (`router_jitter_noise`), or draw experts.
    """
    noisy = [module for module in model.modules() if any(getattr(module, name, None) for name in _NOISE)]
    for module in noisy:
        # Whoever puts the model in training mode puts this in it too; what lies below keeps its mode.
        module.register_forward_pre_hook(_as_in_evaluation)
    if noisy:
        rank_zero_info(
            f"the noise of {len(noisy)} routers is off, as dropout is: log-probabilities of two passes agree "
            "(network.dropout: null keeps both)"
        )


def _as_in_evaluation(module: nn.Module, inputs: Any) -> None:
    module.training = False
