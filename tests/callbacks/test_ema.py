"""The moving average of the weights: its values, where it is seen and where not, and a run that was interrupted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Callback
from safetensors.torch import load_file
from support.configs import METHODS, config
from torch import Tensor

from lit_align import Lora, Network
from lit_align.callbacks import HFExport, WeightEMA
from lit_align.cli.entry import main
from lit_align.modules.strategy import FSDP2Strategy
from lit_align.modules.zero import ZeROStrategy


class Watch(Callback):
    """The weights after each batch, at the start of each validation and at the end of it."""

    def __init__(self) -> None:
        self.after: list[dict[str, Tensor]] = []
        self.validated: list[dict[str, Tensor]] = []
        self.first: dict[str, Tensor] = {}

    def on_train_start(self, trainer: Any, module: Any) -> None:
        self.first = self.look(module)

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        self.after.append(self.look(module))

    def on_validation_batch_start(self, trainer: Any, module: Any, *_: Any) -> None:
        self.validated.append(self.look(module))

    @staticmethod
    def look(module: Any) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}


def averages(watch: Watch, decay: float) -> list[dict[str, Tensor]]:
    """By the formula, after each batch."""
    made = [watch.first]
    for t, weights in enumerate(watch.after):
        d = min(decay, (1 + t) / (10 + t))
        made.append({name: d * made[-1][name] + (1 - d) * weights[name] for name in weights})
    return made[1:]


def same(one: dict[str, Tensor], other: dict[str, Tensor], **tolerance: float) -> bool:
    assert one.keys() == other.keys()
    return all(torch.allclose(one[name], other[name], **tolerance) for name in one)


@pytest.mark.parametrize("decay", [0.3, 0.999])
@pytest.mark.parametrize("lora", [None, Lora(r=2)], ids=["full", "lora"])
def test_values_and_where_they_are_seen(
    decay: float, lora: Lora | None, fit: Callable, parts: tuple[str, Path], tmp_path: Path
) -> None:
    watch, ema, model = Watch(), WeightEMA(decay), {"optimizer": lambda ps: torch.optim.SGD(ps, lr=0.5)}
    options = {"max_epochs": 2, "data": {"val_fraction": 0.3}, "model": model}
    # Last in the list and first: neither order matters.
    trainer = fit(HFExport(tmp_path / "model"), watch, ema, network=Network(parts[0], lora=lora), **options)
    expected = averages(watch, decay)
    assert ema.steps == len(expected) == trainer.global_step
    assert same(ema.average, expected[-1], atol=1e-6)
    assert not same(ema.average, watch.after[-1], atol=1e-3)
    # Validation sees the average; training does not.
    assert same(watch.validated[-1], expected[-1], atol=1e-6)
    assert same(watch.look(trainer.lightning_module), watch.after[-1], atol=0, rtol=0)
    plain = Watch()
    fit(plain, network=Network(parts[0], lora=lora), **options)
    if lora is None:  # adapters start from random weights
        assert same(plain.after[-1], watch.after[-1], atol=0, rtol=0)
        exported = load_file(tmp_path / "model" / "model.safetensors")
        averaged = {name.removeprefix("policy.hf."): value for name, value in expected[-1].items()}
        assert all(torch.allclose(weight, averaged[name], atol=1e-6) for name, weight in exported.items())
    else:
        with ema.applied(trainer.lightning_module):
            tokens = torch.arange(20, 40)[None]
            ours = trainer.lightning_module.policy.hf.eval()(tokens).logits
        from_folder = Network(str(tmp_path / "model"))
        other = fit(max_steps=1, network=from_folder, limit_train_batches=0).lightning_module
        other.configure_model()
        assert torch.allclose(other.policy.hf.eval()(tokens).logits, ours, atol=1e-4)


@pytest.mark.parametrize("decay", [1.0, -0.1])
def test_a_decay_that_is_none(decay: float) -> None:
    with pytest.raises(ValueError, match=r"decay must be in \[0, 1\)"):
        WeightEMA(decay)


@pytest.mark.parametrize(("kind", "says"), [(FSDP2Strategy, "fsdp2 slices them"), (ZeROStrategy, "zero steps slices")])
def test_slices_are_not_averaged(kind: type, says: str) -> None:
    trainer: Any = SimpleNamespace(strategy=kind.__new__(kind))
    with pytest.raises(ValueError, match=f"WeightEMA averages whole weights, and {says}: use ddp"):
        WeightEMA().setup(trainer, None, "fit")  # type: ignore[arg-type]
    WeightEMA().setup(trainer, None, "validate")  # type: ignore[arg-type]


EMA = {"class_path": "lit_align.callbacks.WeightEMA", "init_args": {"decay": 0.5}}


def run(parts: tuple[str, Path], method: str, out: Path, *more: str, callbacks: list[Any] | None = None) -> Path:
    """A fit of six batches by the command line, as YAML has it."""
    per_batch = 4 if method == "ppo" else 1
    told = config(method, *parts, out, max_steps=6 * per_batch, val_check_interval=2)
    told["checkpoint"] = {"every_n_train_steps": 2 * per_batch}
    told["trainer"]["callbacks"] = [EMA, *(callbacks or [])]
    out.with_suffix(".yaml").write_text(yaml.safe_dump(told))
    main(["fit", "-c", str(out.with_suffix(".yaml")), *more])
    return out


def saved(out: Path) -> dict[str, Any]:
    return torch.load(out / "checkpoints" / "last.ckpt", weights_only=True)


@pytest.mark.parametrize("method", METHODS)
def test_interrupted_and_resumed_is_uninterrupted(method: str, parts: tuple[str, Path], tmp_path: Path) -> None:
    whole = run(parts, method, tmp_path / "whole")
    stop = {"class_path": "support.stop.StopAt", "init_args": {"batch": 5}}
    with pytest.raises(RuntimeError, match="stopped"):
        run(parts, method, tmp_path / "broken", callbacks=[stop])
    broken = tmp_path / "broken"
    run(parts, method, broken, "--ckpt_path", str(broken / "checkpoints" / "last.ckpt"))
    one, other = saved(whole), saved(broken)
    key = next(name for name in one["callbacks"] if name.startswith("WeightEMA"))
    steps = 6 * (4 if method == "ppo" else 1)
    assert one["callbacks"][key]["steps"] == other["callbacks"][key]["steps"] == steps, "every optimizer step counts"
    average = one["callbacks"][key]["average"]
    assert same(average, other["callbacks"][key]["average"], atol=0, rtol=0)
    # Of the weights: a reward model's mean and deviation are those of the last validation before the checkpoint.
    assert all(torch.equal(one["state_dict"][name], other["state_dict"][name]) for name in average)
    # What is frozen is in neither; and the weights are the weights.
    assert set(average) <= set(one["state_dict"])
    assert not [name for name in average if "reference" in name]
    assert any(not torch.equal(average[name], one["state_dict"][name]) for name in average)
    exported = [load_file(out / "model" / "model.safetensors") for out in (whole, broken)]
    assert same(*exported, atol=0, rtol=0)
    if method in ("sft", "dpo", "ppo"):
        role = "policy.hf."
        assert all(torch.equal(weight, average[role + name]) for name, weight in exported[0].items())
