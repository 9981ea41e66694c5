"""PPO's four roles on one backbone."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from support.runs import echo, write_rows
from support.tiny import tiny_folder

from lit_align import FunctionReward, ModelReward, Network, PPOModule, PromptDataModule, Sampling, SFTModule, Source
from lit_align.functional.packing import pack
from lit_align.models import Lora, load_causal_lm, load_scorer
from lit_align.models.lora import adapter_parameters
from lit_align.models.roles import save_adapter
from lit_align.models.scalar import ScalarModel
from lit_align.modules.memory import memory_budget
from lit_align.types import Example, Segment


@pytest.fixture
def place(tmp_path: Path) -> Path:
    write_rows(tmp_path)
    folder = tiny_folder(tmp_path / "model")
    torch.manual_seed(5)
    scorer = ScalarModel(load_scorer(Network(folder, lora=Lora(r=2))))
    for parameter in scorer.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    save_adapter(scorer.hf, tmp_path / "reward")
    return tmp_path


def module(place: Path, lora: Lora | None = Lora(r=2)) -> PPOModule:  # noqa: B008
    folder, reward = str(place / "model"), str(place / "reward")
    return PPOModule(
        Network(folder, lora=lora),
        ModelReward(Network(reward, shared=True)),
        value=Network(reward, shared=True),
        optimizer=functools.partial(torch.optim.AdamW, lr=0.01),
        sampling=Sampling(6),
        micro_batch_size=4,
        epochs=2,
    )


def fit(place: Path, ppo: PPOModule, **options: object) -> Trainer:
    torch.manual_seed(0)
    demos = [Source(str(place / "demos.json"))]
    data = PromptDataModule(str(place / "model"), demos, val_fraction=0.0, batch_size=4, cache_dir="none")
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, max_epochs=1, **options
    )  # type: ignore[arg-type]
    trainer.fit(ppo, data)
    return trainer


# Kills: the value's adapters trained as the policy's, or not at all; the reward's trained; roles saved as models.
def test_one_backbone_four_roles(place: Path) -> None:
    ppo = module(place)
    ppo.configure_model()
    before = {name: parameter.clone() for name, parameter in ppo.named_parameters()}
    policy, value = (group["params"] for group in ppo.parameter_groups())
    assert len(value) == len(adapter_parameters(ppo.policy, "value")) + 1
    assert not {id(p) for p in policy} & {id(p) for p in value}
    trainer = fit(place, ppo, callbacks=[ModelCheckpoint(dirpath=place / "kept", save_last=True)])
    assert trainer.callback_metrics["ppo/first_ratio"] == 1.0
    changed = {name for name, parameter in ppo.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == {name for name, parameter in ppo.named_parameters() if parameter.requires_grad}
    assert {name.split(".")[-2] for name in changed} == {"lit_align", "value", "linear"}
    assert set(torch.load(place / "kept" / "last.ckpt")["state_dict"]) == {*changed, "value.mean", "value.std"}
    roles = {role.role: role for role in memory_budget(ppo, trainer.optimizers)}
    assert set(roles) == {"policy", "value", "reward", "reward_2"}
    backbone = sum(p.numel() for name, p in ppo.policy.named_parameters() if ".lora_" not in name)
    assert sum(role.parameters for role in roles.values()) < 1.5 * backbone
    assert ppo.reference is None


# Kills: gradients of the policy that other adapters, switched on since its forward, get or keep from it.
def test_the_forward_that_scores_trains_the_policy_after_other_roles_were_on(place: Path) -> None:
    def trained(keep: bool) -> dict[str, torch.Tensor]:
        ppo = module(place)
        update, there = ppo.update, []

        def updated(batch: Any, ptx: Any) -> Any:
            there.append(batch[0].scored is not None)
            return update(batch if keep else [old._replace(scored=None) for old in batch], ptx)

        ppo.update = updated  # type: ignore[method-assign]
        fit(place, ppo, enable_checkpointing=False)
        assert there == [True, False] * 2
        return ppo.state_dict()

    kept, again = trained(True), trained(False)
    assert all(torch.equal(kept[name], again[name]) for name in again)


def test_a_reference_below_adapters_does_not_drop_units(place: Path) -> None:
    module = SFTModule(Network(str(place / "model"), dropout=0.5, lora=Lora(r=2)))
    module.configure_model()
    module.load_reference(None)
    batch = pack([Example(Segment([9, 10, 11], [False] * 3), [Segment([12, 13, 14], [True] * 3)])])
    assert torch.equal(module.reference_logps(batch), module.reference_logps(batch))
    assert module.policy.training
    assert not torch.equal(module.policy(batch).logps_S, module.policy(batch).logps_S)


def test_what_shares_needs_a_policy_that_is_adapters(place: Path) -> None:
    with pytest.raises(ValueError, match=r"train it by network.lora"):
        module(place, lora=None).configure_model()
    alone = ModelReward(Network(str(place / "reward"), shared=True))
    with pytest.raises(ValueError, match="shared needs a policy to share with"):
        alone.load(None)  # type: ignore[arg-type]
    for load in (load_causal_lm, load_scorer):
        with pytest.raises(ValueError, match="shared is for the value and the rewards of PPO"):
            load(Network(str(place / "model"), shared=True))
    assert FunctionReward(echo).attach(None) is None  # type: ignore[arg-type, func-returns-value]
