"""Settings that a run would take without a word: rates, epochs, batches, warm-up, prices, precision."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from lightning import Trainer

from lit_align.data.data_module import TextDataModule
from lit_align.doctor.finding import Finding
from lit_align.functional.dpo_losses import loss_options
from lit_align.modules.base import AlignModule
from lit_align.modules.dpo import DPOModule
from lit_align.modules.ppo import PPOModule
from lit_align.modules.reward import RewardModule


class Usual(NamedTuple):
    """Usual rates of Adam and its kin.

    Attributes:
        low: smallest.
        high: largest, of a model with 1e9 parameters or more; see `usual_high`.
        source: who used such rates.
    """

    low: float
    high: float
    source: str


_LORA = "Hu et al. 2021; Dettmers et al. 2023, QLoRA"
RATES: dict[tuple[str, bool], Usual] = {
    ("pretraining", False): Usual(5e-5, 1e-3, "Brown et al. 2020, table 2.1"),
    ("pretraining", True): Usual(5e-5, 1e-3, _LORA),
    ("SFT", False): Usual(1e-6, 1e-4, "Alpaca and Zephyr 2e-5, Tulu 3 5e-6"),
    ("SFT", True): Usual(2e-5, 5e-4, _LORA),
    ("a reward model", False): Usual(1e-6, 5e-5, "InstructGPT 9e-6, Ziegler et al. 2019 5e-5"),
    ("a reward model", True): Usual(1e-5, 5e-4, _LORA),
    ("DPO", False): Usual(1e-7, 5e-6, "Rafailov et al. 2023 1e-6, Zephyr and Tulu 3 5e-7"),
    ("DPO", True): Usual(1e-6, 1e-4, _LORA),
    ("PPO", False): Usual(1e-7, 1e-5, "InstructGPT 9e-6, DeepSeekMath 1e-6, Tulu 3 3e-7"),
    ("PPO", True): Usual(1e-6, 1e-4, _LORA),
}
FAR, SPOILT = 5.0, 100.0


def settings(trainer: Trainer, module: AlignModule, data: TextDataModule) -> Iterator[Finding]:
    """Every check of settings that applies; nothing is computed."""
    yield from rates(module)
    yield from lengths(trainer, module, data)
    yield from prices(module)
    yield from precision(trainer, module)


def kind_of(module: AlignModule) -> tuple[str, bool]:
    """The method as `RATES` calls it, and whether adapters are trained."""
    network: Any = getattr(module, "network", None)
    lora = getattr(network, "lora", None) is not None
    if isinstance(module, PPOModule):
        return "PPO", lora
    if isinstance(module, DPOModule):
        return "DPO", lora
    if isinstance(module, RewardModule):
        return "a reward model", lora
    return ("pretraining" if getattr(network, "weights", None) == "random" else "SFT"), lora


def usual_high(usual: Usual, parameters: int) -> float:
    """The largest usual rate of a model: small ones take more, by the cube root of the size, and at most 30 times.

    Source: Brown et al. 2020, table 2.1: 6e-4 at 1.3e8 parameters, 2e-4 at 1.3e9.
    """
    return usual.high * min(max((1e9 / max(parameters, 1)) ** (1 / 3), 1.0), 30.0)


def rates(module: AlignModule) -> Iterator[Finding]:
    """Learning rates against what others took for the method."""
    optimizer: Any = module.optimizer(module.parameter_groups())
    name = type(optimizer).__name__
    parameters = sum(p.numel() for p in module.parameters())
    kind, lora = kind_of(module)
    usual = RATES[kind, lora]
    high = usual_high(usual, parameters)
    how = f"{kind} with {'adapters' if lora else 'all weights'}"
    known = "adam" in name.lower() or name == "RMSprop"
    for rate in sorted({float(group["lr"]) for group in optimizer.param_groups}):
        says = f"{rate:.1e} for {how}; usual are {usual.low:.0e} to {high:.0e} ({usual.source})"
        if rate == 0:
            yield Finding("wrong", "rate", "the learning rate is 0: nothing would be trained; set model.optimizer")
        elif not known:
            yield Finding("ok", "rate", f"{rate:.1e} of {name}, for which no usual rates are known here")
        elif rate > high * SPOILT:
            yield Finding("wrong", "rate", f"{says}: {rate / high:,.0f} times the largest; lower model.optimizer.lr")
        elif rate > high * FAR:
            yield Finding("look", "rate", f"{says}: {rate / high:,.0f} times the largest; lower model.optimizer.lr")
        elif rate < usual.low / FAR:
            yield Finding("look", "rate", f"{says}: it may learn nothing; raise model.optimizer.lr")
        else:
            yield Finding("ok", "rate", says)


def lengths(trainer: Trainer, module: AlignModule, data: TextDataModule) -> Iterator[Finding]:
    """Epochs, batches and warm-up against the number of examples."""
    examples = len(data.training_items(1)) and len(data._training_order())  # public items come one by one
    step = data.batch_size * trainer.world_size * trainer.accumulate_grad_batches
    batches = math.ceil(examples / (data.batch_size * trainer.world_size))
    per_epoch = math.ceil(batches / trainer.accumulate_grad_batches) * module.optimizer_steps_per_batch
    epochs = trainer.max_epochs if trainer.max_epochs is not None and trainer.max_epochs >= 0 else math.inf
    steps = min(epochs * per_epoch, trainer.max_steps if trainer.max_steps >= 0 else math.inf)
    taken = steps / per_epoch
    said = f"{taken:,.3g} epochs of {examples:,} examples, {steps:,.0f} optimizer steps"
    if math.isinf(steps):
        yield Finding("look", "epochs", "the run has no end in steps or epochs: set trainer.max_epochs")
    elif steps == 0:
        yield Finding("wrong", "epochs", "the run takes no step: raise trainer.max_epochs or trainer.max_steps")
    elif taken > 20:
        yield Finding("look", "epochs", f"{said}: few methods gain after 3; lower trainer.max_epochs or max_steps")
    else:
        yield Finding("ok", "epochs", said)
    if step > examples:
        says = f"an optimizer step takes {step:,} examples, and there are {examples:,}"
        yield Finding("look", "batch", f"{says}: some come several times; lower data.batch_size or accumulation")
    warmup = getattr(module.schedule, "warmup", 0.0)
    warmup = warmup if warmup >= 1 else warmup * steps if warmup else 0.0
    if warmup and warmup >= steps:
        says = f"{warmup:,.0f} steps of warm-up in a run of {steps:,.0f}"
        yield Finding("wrong", "warm-up", f"{says}: the full rate is never reached; lower model.schedule.warmup")
    elif warmup > 0.5 * steps:
        says = f"{warmup:,.0f} of {steps:,.0f} steps are warm-up"
        yield Finding("look", "warm-up", f"{says}: 1 to 10 % are usual; lower model.schedule.warmup")


def prices(module: AlignModule) -> Iterator[Finding]:
    """How much it costs to leave the reference, and what is sampled, where it is far from what others took."""
    if isinstance(module, DPOModule):
        usual = loss_options(module.loss_name)["beta"]
        if usual and not usual / 20 <= module.beta <= usual * 20:
            says = f"{module.beta:g} for loss {module.loss_name}, whose own default is {usual:g}"
            yield Finding("look", "beta", f"{says}: small ones leave the reference, large ones learn nothing")
    if not isinstance(module, PPOModule):
        return
    odd = (
        ("kl_coef", module.kl_coef, 0.0, 1.0, "0.001 to 0.2"),
        ("clip", module.clip, 0.05, 0.5, "0.1 to 0.3"),
        ("discount", module.discount, 0.95, 1.0, "1"),
        ("lambda_", module.lambda_, 0.8, 1.0, "0.95 to 1"),
        ("sampling.temperature", module.sampling.temperature, 0.3, 1.5, "0.7 to 1"),
        ("epochs", module.epochs, 1, 10, "1 to 4"),
    )
    for name, value, low, high, usual_values in odd:
        if not low <= value <= high:
            yield Finding("look", "price", f"model.{name} is {value:g}; usual are {usual_values}")


def precision(trainer: Trainer, module: AlignModule) -> Iterator[Finding]:
    """Weights that are trained in a precision that rounds small updates away."""
    dtypes = {str(p.dtype).removeprefix("torch.") for p in module.parameters() if p.requires_grad}
    if trainer.precision in ("16-true", "bf16-true"):
        dtypes.add({"16-true": "float16", "bf16-true": "bfloat16"}[trainer.precision])
    way_out = "leave network.dtype at float32 and set trainer.precision: bf16-mixed"
    if "float16" in dtypes:
        yield Finding("wrong", "precision", f"trained weights are float16, whose range is too small: {way_out}")
    elif "bfloat16" in dtypes:
        says = "trained weights are bfloat16: an update below 0.4 % of a weight is rounded away"
        yield Finding("look", "precision", f"{says}; {way_out}")
