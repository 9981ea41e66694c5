"""Check the options of on-policy methods before anything is loaded; each error is one line."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Literal, get_args

from lit_align.functional.group import GROUP_ADVANTAGES

if TYPE_CHECKING:
    from lit_align.modules.on_policy import OnPolicyModule
    from lit_align.modules.ppo import PPOModule

Advantage = Literal["gae", "rloo", "grpo", "dr_grpo", "reinforce++", "reinforce++_baseline", "remax"]

# Accepted ranges, as errors name them. NaN is in no range.
FITS: dict[str, Callable[[float], bool]] = {
    "above 0": lambda value: value > 0,
    "above 1": lambda value: value > 1,
    "at least 0": lambda value: value >= 0,
    "at least 1": lambda value: value >= 1,
    "in [0, 1]": lambda value: 0 <= value <= 1,
}
ON_POLICY = {
    "at least 1": "epochs mini_batches micro_batch_size",
    "at least 1, or null": "micro_batch_tokens",
    "above 0, or null": "max_grad_norm",
    "at least 0": "ptx_coef",
}
PPO = {
    "above 0": "clip kl_horizon",
    "above 0, or null": "clip_high value_clip kl_target target_kl reward_clip",
    "above 1, or null": "dual_clip",
    "at least 0": "value_coef value_warmup kl_coef missing_eos_penalty",
    "at least 0, or null": "value_lr",
    "in [0, 1]": "discount lambda_",
}


def check_ranges(module: object, ranges: Mapping[str, str]) -> None:
    """Refuse options outside of their range.

    Args:
        module: has an attribute for each option.
        ranges: maps an accepted range (a key of `FITS`, with ", or null" if null is allowed) to names of options.

    Raises:
        ValueError: names the option and the accepted range.
    """
    for accepted, names in ranges.items():
        for name in names.split():
            value = getattr(module, name)
            if value is None and accepted.endswith(", or null"):
                continue
            if value is None or not FITS[accepted.removesuffix(", or null")](value):
                raise ValueError(f"model.{name} must be {accepted}, got {value}")


def check_on_policy(module: OnPolicyModule) -> None:
    """Check the options of `OnPolicyModule`."""
    check_ranges(module, ON_POLICY)
    if module.sampling.temperature == 0:
        raise ValueError("PPO explores by sampling: set sampling.temperature above 0")
    if module.network.head != "own":
        # Entropies and gradients would come from different kernels, and the first ratio would be only nearly 1.
        raise ValueError(f"PPO measures entropies, which head {module.network.head} does not give: unset network.head")


def check_ppo(module: PPOModule) -> None:
    """Check the options of `PPOModule`, each alone and in combination."""
    check_ranges(module, PPO)
    advantage = module.advantage
    if advantage not in get_args(Advantage):
        raise ValueError(f"unknown advantage {advantage!r}: choose one of {', '.join(get_args(Advantage))}")
    if advantage != "gae":
        own = {"value": module.value_network, "value_lr": module.value_lr, "value_warmup": module.value_warmup or None}
        for key in [key for key, given in own.items() if given is not None]:
            raise ValueError(f"advantage {advantage} has no value model: unset model.{key}")
    if advantage in GROUP_ADVANTAGES and module.sampling.samples < 2:
        raise ValueError(
            f"advantage {advantage} compares answers to one prompt: set model.sampling.samples to at least 2"
        )
    if module.kl_in not in ("reward", "loss"):
        raise ValueError(f"unknown kl_in {module.kl_in!r}: choose reward or loss")
    if module.kl_in == "loss" and module.kl_estimator == "k1":
        raise ValueError("as a loss k1 has no gradient on average: set model.kl_estimator to k2, k3 or k3+")
