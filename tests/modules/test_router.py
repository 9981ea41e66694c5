"""The load-balancing loss of a mixture of experts is that of transformers, in every layout; its noise is off."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer
from support.runs import echo, write_rows
from support.tiny import tiny_folder
from torch import Tensor
from transformers import AutoModelForCausalLM

from lit_align import (
    DPOModule,
    FunctionReward,
    InstructionDataModule,
    Lora,
    Network,
    PPOModule,
    PreferenceDataModule,
    RewardModule,
    SFTModule,
    Source,
)
from lit_align.functional.packing import pack, unpack
from lit_align.models import load_causal_lm
from lit_align.modules.router import micro_step_with_router
from lit_align.types import Example, PackedBatch, Segment

MIXTURES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4, "num_key_value_heads": 2},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 8},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
}


def mixture(place: Path, architecture: str = "mixtral", **changes: Any) -> str:
    options = {"output_router_logits": True, "router_aux_loss_coef": 0.5, **MIXTURES[architecture], **changes}
    return tiny_folder(place / architecture, architecture, **options)


def examples() -> list[Example]:
    """A chain, and a prompt with two answers."""
    draw = torch.Generator().manual_seed(3)

    def segment(length: int, scored: bool) -> Segment:
        return Segment(torch.randint(9, 60, (length,), generator=draw).tolist(), [scored] * length)

    return [
        Example(segment(4, False), [segment(5, True)]),
        Example(segment(6, False), [segment(3, True) for _ in "12"]),
    ]


def loaded(module: Any) -> Any:
    module.configure_model()
    return module


def sft(folder: str, **options: Any) -> SFTModule:
    return loaded(SFTModule(Network(folder, dtype="float64", **options)))


def plain_loss(folder: str, batch: PackedBatch) -> tuple[Tensor, Tensor, Any]:
    """What transformers computes on one sequence a row: the loss, its auxiliary part, and the model."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    model.set_experts_implementation("eager")
    rows = unpack(batch)
    labels = torch.full_like(rows.tokens_RN, -100)
    # A source predicts the token after it.
    labels.view(-1)[rows.source_S + 1] = rows.target_S
    output = model(input_ids=rows.tokens_RN, attention_mask=(rows.tree_RN >= 0).long(), labels=labels)
    return output.loss, model.router_aux_loss_coef * output.aux_loss, model


# Kills: no auxiliary loss at all; padding counted; a shared prompt counted once; the last layer's unread tokens lost.
@pytest.mark.parametrize("architecture", MIXTURES)
def test_the_loss_and_its_gradient_are_those_of_transformers(architecture: str, tmp_path: Path) -> None:
    folder = mixture(tmp_path, architecture)
    batch = pack(examples(), row_tokens=16)
    expected, balance, plain = plain_loss(folder, batch)
    expected.backward()
    module = sft(folder)
    total = micro_step_with_router(module, batch)
    sums = module._sums
    assert balance.item() > 0.1
    assert sums["loss"][0].item() / sums["loss"][1] == pytest.approx(expected.item(), rel=1e-6)
    assert sums["router_loss"][0].item() / sums["router_loss"][1] == pytest.approx(balance.item(), rel=1e-6)
    (total / sums["loss"][1]).backward()
    for (name, ours), theirs in zip(module.policy.hf.named_parameters(), plain.parameters(), strict=True):
        # transformers rounds norms and the router's probabilities to fp32.
        assert (ours.grad - theirs.grad).abs().max() <= 1e-4 * theirs.grad.abs().max(), name  # type: ignore[operator]


@pytest.mark.parametrize("attention", [None, "eager"])
def test_the_layout_of_a_batch_changes_nothing(attention: Any, tmp_path: Path) -> None:
    folder = mixture(tmp_path)
    layouts = [pack(examples(), row_tokens=n) for n in (16, 40)]
    totals = []
    for batch in [*layouts, unpack(layouts[0])]:
        module = sft(folder, attention=attention)
        totals.append(micro_step_with_router(module, batch).item())
        assert module.policy.thrifty  # as it was
    unpacked = sft(folder, attention=attention)
    unpacked.policy.packs = False
    totals.append(micro_step_with_router(unpacked, layouts[0]).item())
    assert totals == pytest.approx(totals[:1] * 4, rel=1e-6)


def test_over_micro_batches_it_is_the_mean_weighted_by_their_tokens(tmp_path: Path) -> None:
    module = sft(mixture(tmp_path))
    batches = [pack([example]) for example in examples()]
    alone = []
    for batch in batches:
        micro_step_with_router(module, batch)
        total, count = module._sums["router_loss"]
        alone.append((total.item() / count, count))
        module._sums = {}
    for batch in batches:
        micro_step_with_router(module, batch)
    total, count = module._sums["router_loss"]
    assert count == module._sums["loss"][1] == 5 + 6
    assert total.item() / count == pytest.approx(sum(loss * n for loss, n in alone) / 11, rel=1e-6)


def test_activations_computed_again_give_the_same_gradient(tmp_path: Path) -> None:
    folder, batch = mixture(tmp_path), pack(examples(), row_tokens=16)
    gradients = []
    for again in (False, True):
        module = sft(folder, activation_checkpointing=again)
        micro_step_with_router(module, batch).backward()
        gradients.append([p.grad for p in module.policy.hf.parameters()])
    assert all(torch.allclose(a, b, atol=1e-9) for a, b in zip(*gradients, strict=True))


def test_the_option_is_over_the_configuration(tmp_path: Path) -> None:
    batch = pack(examples())
    silent = mixture(tmp_path / "silent", output_router_logits=False)
    assert sft(silent).router_loss is None
    asked = sft(silent, router_loss=0.25)
    micro_step_with_router(asked, batch)
    told = sft(mixture(tmp_path / "told"), router_loss=None)
    micro_step_with_router(told, batch)
    assert asked._sums["router_loss"][0] * 2 == pytest.approx(told._sums["router_loss"][0].item(), rel=1e-6)
    assert sft(mixture(tmp_path / "told"), router_loss=0.0).router_loss is None


def test_what_cannot_be_added_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"LlamaForCausalLM has no load-balancing loss .*: set network.router_loss: 0"):
        sft(tiny_folder(tmp_path / "llama"), router_loss=0.1)
    with pytest.raises(ValueError, match=r"PPOModule adds no load-balancing loss, .*: set network.router_loss: 0"):
        loaded(PPOModule(Network(mixture(tmp_path)), FunctionReward(echo)))
    with pytest.raises(ValueError, match=r"does not reach compiled code: unset network.compile"):
        sft(mixture(tmp_path), compile=True)
    with pytest.raises(ValueError, match="router_loss must be 0 or more, got -1"):
        Network("any", router_loss=-1.0)


def trained(place: Path, module: Any, data: Any) -> dict[str, float]:
    torch.manual_seed(0)
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, max_steps=1,
        enable_checkpointing=False, limit_val_batches=0,
    )  # fmt: skip
    trainer.fit(module, data)
    return {name: value.item() for name, value in trainer.callback_metrics.items()}


@pytest.mark.filterwarnings("ignore:lora.targets. all-linear does not reach the experts")
@pytest.mark.parametrize("lora", [None, Lora(r=2)])
@pytest.mark.parametrize("method", [SFTModule, DPOModule, RewardModule])
def test_every_method_with_a_fixed_batch_logs_it(method: Any, lora: Lora | None, tmp_path: Path) -> None:
    write_rows(tmp_path)
    folder, options = mixture(tmp_path), {"val_fraction": 0.0, "batch_size": 2, "cache_dir": "none"}
    data, rows = (InstructionDataModule, "demos") if method is SFTModule else (PreferenceDataModule, "rankings")
    source = [Source(str(next(tmp_path.glob(f"{rows}.json"))))]
    optimizer = functools.partial(torch.optim.SGD, lr=0.1)
    losses = []
    for weight in (0.0, 0.5):
        module = method(Network(folder, lora=lora, router_loss=weight), optimizer=optimizer)
        losses.append(trained(tmp_path, module, data(folder, source, **options)))
    assert "train/router_loss" not in losses[0]
    assert losses[1]["train/router_loss"] > 0.1
    both = losses[0]["train/loss"] + losses[1]["train/router_loss"]
    assert losses[1]["train/loss"] == pytest.approx(both, rel=1e-4)


NOISY: dict[str, dict[str, Any]] = {
    "mixtral": {**MIXTURES["mixtral"], "router_jitter_noise": 0.5},
    "minimax": {"num_local_experts": 4, "num_key_value_heads": 2, "head_dim": 8, "router_jitter_noise": 0.5},
    "phimoe": {"num_local_experts": 4, "num_key_value_heads": 2, "input_jitter_noise": 0.5},
}


# Kills: noise that comes back when Lightning calls train().
@pytest.mark.parametrize("architecture", NOISY)
def test_two_passes_of_a_model_in_training_agree(architecture: str, tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "start", architecture, **NOISY[architecture])
    ids = torch.arange(9, 40)[None]
    kept, model = (load_causal_lm(Network(folder, dropout=dropout)).train() for dropout in (None, 0.0))
    with torch.no_grad():
        assert not torch.equal(kept(ids).logits, kept(ids).logits)
        scores = model(ids).logits
        assert torch.equal(model(ids).logits, scores)
        assert torch.equal(kept.eval()(ids).logits, scores)
