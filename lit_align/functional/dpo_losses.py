"""The losses that DPOModule knows, by name, and the coefficients that each of them takes."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Literal

from torch import Tensor

from lit_align.functional.dpo import (
    alpha_divergence_loss,
    apo_down_loss,
    apo_zero_loss,
    bco_loss,
    cpo_loss,
    discopop_loss,
    dpo_loss,
    dpo_norm_loss,
    exo_loss,
    forward_kl_loss,
    hinge_loss,
    ipo_loss,
    js_divergence_loss,
    length_dpo_loss,
    nca_loss,
    orpo_loss,
    plackett_luce_dpo_loss,
    robust_loss,
    simpo_loss,
    sppo_loss,
)
from lit_align.functional.kto import ranked_kto_loss

# The `loss` option of DPOModule.
LossName = Literal[
    "sigmoid", "robust", "hinge", "ipo", "sigmoid_norm", "r_dpo", "exo_pair", "discopop",
    "forward_kl", "js_divergence", "alpha_divergence",
    "nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down",
    "simpo", "cpo", "orpo",
    "plackett_luce", "kto",
]  # fmt: skip
# On pairs: `PairLogps` and coefficients to a loss for each pair. Shape (P,).
DPO_LOSSES: dict[str, Callable[..., Tensor]] = {
    "sigmoid": dpo_loss,
    "robust": robust_loss,
    "hinge": hinge_loss,
    "ipo": ipo_loss,
    "sigmoid_norm": dpo_norm_loss,
    "r_dpo": length_dpo_loss,
    "exo_pair": exo_loss,
    "discopop": discopop_loss,
    "forward_kl": forward_kl_loss,
    "js_divergence": js_divergence_loss,
    "alpha_divergence": alpha_divergence_loss,
    "nca_pair": nca_loss,
    "bco_pair": bco_loss,
    "sppo_hard": sppo_loss,
    "apo_zero": apo_zero_loss,
    "apo_down": apo_down_loss,
    "simpo": simpo_loss,
    "cpo": cpo_loss,
    "orpo": orpo_loss,
}
# On all answers to a prompt, not taken apart into pairs: log-ratios, ranks, examples, E and coefficients. Shape (E,).
RANKING_LOSSES: dict[str, Callable[..., Tensor]] = {"plackett_luce": plackett_luce_dpo_loss, "kto": ranked_kto_loss}
# Losses that never look at the reference: DPOModule then loads none.
REFERENCE_FREE = frozenset({"simpo", "cpo", "orpo"})
# Losses of log-probabilities per token: an answer is preferred by its mean, not by its sum.
PER_TOKEN = frozenset({"ipo", "sigmoid_norm", "simpo", "orpo"})


def loss_options(name: str, **given: float | None) -> dict[str, float]:
    """The coefficients of a loss: its own defaults, and in their place what is given and not None.

    Raises:
        ValueError: no such loss, or it has no such coefficient. To ignore it would be a run that is not what its
            configuration says.
    """
    loss = (DPO_LOSSES | RANKING_LOSSES).get(name)
    if loss is None:
        raise ValueError(f"unknown loss {name!r}: choose one of {', '.join(DPO_LOSSES | RANKING_LOSSES)}")
    parameters = inspect.signature(loss).parameters.values()
    options = {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
    for option, value in given.items():
        if value is not None and option not in options:
            raise ValueError(f"the {name} loss has no {option}: it takes {', '.join(options)}")
    return options | {option: value for option, value in given.items() if value is not None}
