"""Several roles on one backbone say what models of their own would say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from support.tiny import ARCHITECTURES, norms_in_float64, tiny_folder
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from lit_align.accelerate import accelerate
from lit_align.functional.packing import pack
from lit_align.models import LanguageModel, Lora, Network, load_causal_lm, load_scorer
from lit_align.models.lora import adapters_off
from lit_align.models.roles import CONFIG, WEIGHTS, ScalarAdapter, save_adapter, trained_apart
from lit_align.models.scalar import ScalarModel
from lit_align.types import Example, PackedBatch, Segment


def batch() -> PackedBatch:
    draw = torch.Generator().manual_seed(3)

    def segment(length: int, scored: bool) -> Segment:
        return Segment(torch.randint(9, 60, (length,), generator=draw).tolist(), [scored] * length)

    return pack([Example(segment(n, False), [segment(4, True), segment(2, True)]) for n in (5, 8)], row_tokens=20)


def shake(parameters: list[nn.Parameter], seed: int) -> None:
    """New adapters change nothing: give these something to say."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=draw, dtype=parameter.dtype))


def policy_of(folder: str, **options: object) -> LanguageModel:
    torch.manual_seed(0)
    policy = LanguageModel(load_causal_lm(Network(folder, dtype="float64", lora=Lora(r=4), **options)))  # type: ignore[arg-type]
    shake([p for p in policy.parameters() if p.requires_grad], seed=1)
    return policy


@pytest.fixture(params=ARCHITECTURES)
def base(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return tiny_folder(tmp_path / "base", request.param)


@pytest.fixture
def llama(tmp_path: Path) -> str:
    return tiny_folder(tmp_path / "base")


def trained_reward(base: str, folder: Path) -> ScalarModel:
    """A reward model with adapters, written to a folder."""
    scorer = ScalarModel(load_scorer(Network(base, dtype="float64", lora=Lora(r=2))))
    shake([p for p in scorer.parameters() if p.requires_grad], seed=2)
    scorer.normalize(0.25, 1.5)
    save_adapter(scorer.hf, folder)
    return scorer


def without_fingerprint(folder: Path) -> None:
    """An adapter as other programs write it."""
    save_file(load_file(folder / WEIGHTS), folder / WEIGHTS, metadata={"format": "pt"})


# Kills: the policy's adapters left on; the head of another role; the normalisation lost; the policy's adapters lost.
def test_a_reward_on_the_policys_backbone_is_the_reward_model(base: str, tmp_path: Path) -> None:
    reward = trained_reward(base, tmp_path / "reward").eval()
    policy = policy_of(base).eval()
    with norms_in_float64(), torch.no_grad():
        before = policy(batch()).logps_S
        with adapters_off(policy):
            reference = policy(batch()).logps_S
        shared = ScalarAdapter(policy, Network(str(tmp_path / "reward"), shared=True), "reward")
        assert (shared.rewards(batch()) - reward.rewards(batch())).abs().max() < 1e-12
        assert (policy(batch()).logps_S - before).abs().max() < 1e-12
        with adapters_off(policy):
            assert (policy(batch()).logps_S - reference).abs().max() < 1e-12
    assert (before - reference).abs().max() > 0.1
    assert not any(p.requires_grad for p in shared.trained_parameters())
    assert any(p.requires_grad for p in policy.parameters())


def gradients(policy: LanguageModel, value: ScalarAdapter) -> list[Tensor]:
    """Of a loss of both roles, taken at once as PPO does."""
    loss = policy(batch()).logps_S.sum() + value.values(batch()).square().sum()
    with adapters_off(policy):  # another role is at work by the time of backward
        loss.backward()
    return [p.grad.clone() for group in trained_apart(policy, value) for p in group if p.grad is not None]


def test_a_value_on_the_policys_backbone_learns_as_one_of_its_own(llama: str) -> None:
    with norms_in_float64():
        policy = policy_of(llama)
        value = ScalarAdapter(policy, Network(llama, lora=Lora(r=2), shared=True), "value", trained=True)
        shake(value.trained_parameters(), seed=3)
        alone = ScalarModel(load_scorer(Network(llama, dtype="float64", lora=Lora(r=2))))
        own = {name.replace(".lit_align.", "."): p for name, p in alone.hf.named_parameters() if p.requires_grad}
        shared = {n.replace(".value.", "."): p for n, p in policy.hf.named_parameters() if ".value." in n}
        shared["score.weight"] = value.linear.weight
        assert set(own) == set(shared)
        for name, parameter in own.items():
            parameter.data.copy_(shared[name])
        of_policy, of_value = trained_apart(policy, value)
        assert len(of_policy) == len(of_value) - 1 == len(own) - 1
        assert {id(p) for p in of_value} == {id(p) for p in shared.values()}
        gradients(policy, value)
        alone.values(batch()).square().sum().backward()
        for name, parameter in own.items():
            assert (parameter.grad - shared[name].grad).abs().max() < 1e-12  # type: ignore[operator]


# Kills: backward computing a layer again with the adapters of whoever is at work by then.
def test_activations_computed_again_have_the_adapters_of_the_first_time(llama: str) -> None:
    results = []
    for again in (False, True):
        policy = policy_of(llama, activation_checkpointing=again)
        value = ScalarAdapter(policy, Network(llama, lora=Lora(r=2), shared=True), "value", trained=True)
        shake(value.trained_parameters(), seed=3)
        with norms_in_float64():
            results.append(gradients(policy, value))
    assert len(results[0]) > 4
    for plain, checkpointed in zip(*results, strict=True):
        assert (plain - checkpointed).abs().max() < 1e-10


# peft 0.21 asks transformers 5.23 by the older name.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_peft_loads_the_adapter_of_a_reward_model(llama: str, tmp_path: Path) -> None:
    reward = trained_reward(llama, tmp_path / "reward").eval()
    model = AutoModelForSequenceClassification.from_pretrained(llama, num_labels=1, dtype=torch.float64)
    accelerate(model)  # transformers' norms round to fp32
    loaded = PeftModel.from_pretrained(model, tmp_path / "reward").eval()
    ids = torch.arange(10, 20)[None]
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, reward.hf(ids).logits)


def test_what_cannot_be_shared(llama: str, tmp_path: Path) -> None:
    policy = policy_of(llama)
    trained_reward(llama, tmp_path / "reward")
    network = Network(str(tmp_path / "reward"), shared=True)
    with pytest.raises(ValueError, match=r"value: shared means adapters .* train it by network.lora"):
        ScalarAdapter(LanguageModel(load_causal_lm(Network(llama))), network, "value")
    with pytest.raises(ValueError, match=r"is neither the folder of an adapter .* nor the policy's model"):
        ScalarAdapter(policy, Network(llama, shared=True), "value")
    save_adapter(policy.hf, tmp_path / "policy")
    with pytest.raises(ValueError, match="has no scalar head: it is not a reward model's"):
        ScalarAdapter(policy, Network(str(tmp_path / "policy"), shared=True), "value")
    without_fingerprint(tmp_path / "reward")
    config = json.loads((tmp_path / "reward" / CONFIG).read_text())
    (tmp_path / "reward" / CONFIG).write_text(json.dumps(config | {"base_model_name_or_path": "other"}))
    with pytest.raises(ValueError, match=r"is one of 'other', and the policy is .*: shared adapters need the same"):
        ScalarAdapter(policy, network, "another")


# Kills: the path alone compared; the head of the language model, which a reward model has not, hashed.
def test_frozen_weights_are_known_by_what_they_are(llama: str, tmp_path: Path) -> None:
    trained_reward(llama, tmp_path / "reward")
    network = Network(str(tmp_path / "reward"), shared=True)
    moved = Path(llama).rename(tmp_path / "moved")
    ScalarAdapter(policy_of(str(moved)), network, "reward")
    tiny_folder(Path(llama), seed=1)
    with pytest.raises(ValueError, match="the weights there have changed since: shared adapters need the same frozen"):
        ScalarAdapter(policy_of(llama), network, "reward")


def test_a_folder_is_the_same_by_another_path(llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained_reward(llama, tmp_path / "reward")
    without_fingerprint(tmp_path / "reward")
    monkeypatch.chdir(tmp_path)
    policy = policy_of(Path(llama).name)
    ScalarAdapter(policy, Network("reward", shared=True), "reward")
    ScalarAdapter(policy, Network(llama, lora=Lora(r=2), shared=True), "value")


@pytest.mark.parametrize("what", ["lacks weights, 1 of them", "has weights without a place in the policy, 1 of them"])
def test_every_weight_of_an_adapter_finds_its_place(what: str, llama: str, tmp_path: Path) -> None:
    trained_reward(llama, tmp_path / "reward")
    file = tmp_path / "reward" / WEIGHTS
    state = load_file(file)
    name = next(name for name in state if "lora_A" in name)
    weight = state[name] if "place" in what else state.pop(name)
    if "place" in what:
        state[name.replace(".layers.", ".blocks.")] = weight.clone()
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=what):
        ScalarAdapter(policy_of(llama), Network(str(tmp_path / "reward"), shared=True), "reward")


def test_a_reward_that_shares_does_not_drop_units(llama: str, tmp_path: Path) -> None:
    trained_reward(llama, tmp_path / "reward")
    policy = policy_of(llama, dropout=0.5)
    shared = ScalarAdapter(policy, Network(str(tmp_path / "reward"), shared=True), "reward")
    with torch.no_grad():
        assert torch.equal(shared.rewards(batch()), shared.rewards(batch()))
        assert not torch.equal(policy(batch()).logps_S, policy(batch()).logps_S)
    assert all(module.training for module in policy.modules())
