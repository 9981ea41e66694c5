"""PPO does what it says: each test is a line of what earlier implementations got wrong."""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from lightning import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from support.runs import echo, write_rows
from support.tiny import tiny_folder
from torch import Tensor

from lit_align import (
    FunctionReward,
    InstructionDataModule,
    ModelReward,
    Network,
    PPOModule,
    PromptDataModule,
    Reward,
    Sampling,
    Source,
)
from lit_align.models import export, load_scorer, load_tokenizer
from lit_align.models.scalar import ScalarModel
from lit_align.modules import Cosine
from lit_align.modules.ppo import Advantage
from lit_align.rollout import TransformersEngine
from lit_align.types import Completion, Rollout

ADVANTAGES = get_args(Advantage)
WITHOUT_VALUE = [advantage for advantage in ADVANTAGES if advantage != "gae"]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    write_rows(tmp_path)
    tiny_folder(tmp_path / "model")
    return tmp_path


def module(place: Path, reward: Reward | None = None, **options: Any) -> PPOModule:
    options = {"sampling": Sampling(6, samples=2), "micro_batch_size": 4, "max_grad_norm": None, **options}
    optimizer = functools.partial(torch.optim.AdamW, lr=0.01)
    return PPOModule(Network(str(place / "model")), reward or FunctionReward(echo), optimizer=optimizer, **options)


def data(place: Path, **options: Any) -> PromptDataModule:
    demos = str(place / "demos.json")
    options = {"val": [Source(demos)], "batch_size": 6, "cache_dir": "none", **options}
    return PromptDataModule(str(place / "model"), [Source(demos, limit=6)], **options)


def fit(ppo: PPOModule, datamodule: PromptDataModule, **options: Any) -> Trainer:
    torch.manual_seed(0)
    options = {"max_epochs": 1, "logger": False, "enable_checkpointing": False, "limit_val_batches": 0, **options}
    trainer = Trainer(accelerator="cpu", enable_progress_bar=False, enable_model_summary=False, **options)
    trainer.fit(ppo, datamodule)
    return trainer


class Recorder(PPOModule):
    """Keeps what it was trained on."""

    def update(self, mini_batch: Any, ptx: Any) -> dict[str, Tensor]:
        if not hasattr(self, "seen"):
            self.seen: list[Any] = []
            self.means: list[dict[str, Tensor]] = []
        ratios = []
        with torch.no_grad():
            for old in mini_batch:
                scored, _ = self(old.batch)
                ratios.append((scored.logps_S - old.logps_S).exp())
        self.seen.append((mini_batch, torch.cat(ratios)))
        self.means.append(super().update(mini_batch, ptx))
        return self.means[-1]


@pytest.mark.parametrize(("samples", "advantage"), [(1, "gae"), *((3, advantage) for advantage in ADVANTAGES)])
def test_the_ratio_of_the_first_pass_is_one(place: Path, samples: int, advantage: str) -> None:
    sampling = Sampling(6, samples=samples, temperature=0.7, top_p=0.9)
    ppo = module(place, sampling=sampling, mini_batches=2, epochs=2, advantage=advantage)
    ppo.__class__ = Recorder
    fit(ppo, data(place))
    first = ppo.seen[0][1]
    assert torch.equal(first, torch.ones_like(first))
    later = ppo.seen[1][1]
    assert not torch.equal(later, torch.ones_like(later))


def test_what_was_sampled_is_what_is_trained(place: Path) -> None:
    sampling = Sampling(6, samples=3, temperature=0.7, top_p=0.9)
    ppo = module(place, sampling=sampling, engine=TransformersEngine())
    metrics = fit(ppo, data(place)).callback_metrics
    assert metrics["ppo/drift_ratio"] == pytest.approx(1.0, abs=1e-4)
    assert metrics["ppo/drift_outside"] == 0.0


def test_an_engine_that_drifts_is_seen(place: Path) -> None:
    def warmer(policy: Any, prompts: Any, sampling: Sampling, stop_ids: Any, seed: int) -> list[list[Completion]]:
        return TransformersEngine()(policy, prompts, replace(sampling, temperature=2.0), stop_ids, seed)

    metrics = fit(module(place, engine=warmer), data(place)).callback_metrics
    assert metrics["ppo/drift_outside"] > 0.3
    ppo = module(place)
    ppo.engine = lambda policy, prompts, *_: [[Completion([60, 2], True), Completion([61], False)] for _ in prompts]
    assert "ppo/drift_ratio" not in fit(ppo, data(place)).callback_metrics


def test_optimizer_steps_are_epochs_times_mini_batches(place: Path) -> None:
    trainer = fit(module(place, epochs=3, mini_batches=2), data(place, batch_size=3), max_epochs=2)
    assert trainer.global_step == 2 * 2 * 3 * 2  # trainer epochs, batches, epochs, mini-batches


def test_every_sequence_is_trained_on_once_an_epoch(place: Path) -> None:
    ppo = module(place, epochs=2, mini_batches=3, micro_batch_size=2)
    ppo.__class__ = Recorder
    fit(ppo, data(place))
    for epoch in (ppo.seen[:3], ppo.seen[3:]):
        batches = [old.batch for mini_batch, _ in epoch for old in mini_batch]
        assert sum(batch.num_sequences for batch in batches) == 12
        assert len({id(batch) for batch in batches}) == len(batches)


def test_the_score_lands_on_the_last_token_that_was_sampled(place: Path) -> None:
    ppo = module(place, kl_coef=0.0, lambda_=1.0, whiten_advantages=False)
    ppo.__class__ = Recorder
    fit(ppo, data(place))
    for mini_batch, _ in ppo.seen:
        for old in mini_batch:
            # Without discount or KL, and values at 0 from the start, every token of an answer returns its score.
            for q in range(old.batch.num_sequences):
                returns = old.returns_S[old.batch.sequence_S == q]
                assert torch.allclose(returns, returns[:1].expand_as(returns), atol=1e-6)
            ends = old.batch.sequence_S.diff(append=torch.tensor([-1])) != 0
            assert torch.equal(old.batch.source_S[ends] + 1, old.batch.last_Q)


def test_a_stop_token_that_is_the_padding_token_is_scored(place: Path) -> None:
    folder = place / "model"
    tokenizer = load_tokenizer(str(folder))
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(folder)
    ppo = module(place)
    stop = tokenizer.eos_token_id

    def answers(policy: Any, prompts: Any, sampling: Sampling, stop_ids: Any, seed: int) -> list[list[Completion]]:
        assert stop in stop_ids
        return [[Completion([60, 61, stop], True), Completion([stop], True)] for _ in prompts]

    ppo.engine = answers
    ppo.__class__ = Recorder
    fit(ppo, data(place))
    batch = ppo.seen[0][0][0].batch
    assert (batch.target_S == stop).sum() == batch.num_sequences


def test_unfinished_answers_pay(place: Path) -> None:
    ppo = module(place, missing_eos_penalty=3.0, reward_clip=2.0)
    ppo.log_all = lambda *_, **__: None  # type: ignore[method-assign]
    ppo.shape_of = lambda *_: {}  # type: ignore[method-assign]
    rollout = Rollout(
        [torch.tensor([1])] * 2,
        [{"prompt": ""}] * 2,
        [Completion([5], True), Completion([6], False)],
        ["abcd", "abcd"],
        2,
    )
    # Both score 4: one is clipped to 2, the other pays 3 first.
    assert ppo.shaped_scores(rollout).tolist() == [2.0, 1.0]


def test_a_rerun_is_equal_to_the_bit(place: Path) -> None:
    weights = []
    for _ in range(2):
        ppo = module(place, mini_batches=2)
        fit(ppo, data(place))
        weights.append({name: p.clone() for name, p in ppo.named_parameters()})
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.parametrize("separate", [False, True])
def test_the_critic_learns_and_is_saved_and_frozen_weights_are_not(place: Path, separate: bool) -> None:
    reward_folder = reward_model(place)
    ppo = module(
        place, ModelReward(Network(reward_folder)), value=Network(reward_folder) if separate else None,
        monitors={"echo": FunctionReward(echo)},
    )  # fmt: skip
    trainer = Trainer(
        max_epochs=1, accelerator="cpu", enable_progress_bar=False, enable_model_summary=False, logger=False,
        limit_val_batches=0, callbacks=[ModelCheckpoint(place / "ckpt", save_last=True, every_n_epochs=1)],
    )  # fmt: skip
    ppo.configure_model()
    before = {name: p.clone() for name, p in ppo.value.named_parameters()}
    trainer.fit(ppo, data(place))
    assert any(not torch.equal(p, before[name]) for name, p in ppo.value.named_parameters())
    saved = torch.load(place / "ckpt" / "last.ckpt", weights_only=True)["state_dict"]
    assert {name.split(".")[0] for name in saved} == {"policy", "value"}


def reward_model(place: Path, tokens: str = "model") -> str:
    torch.manual_seed(5)
    scorer = ScalarModel(load_scorer(Network(str(place / tokens))))
    scorer.normalize(0.3, 2.0)
    return str(export(scorer.hf, load_tokenizer(str(place / tokens)), place / f"reward-{tokens}"))


def test_a_reward_model_scores_the_very_tokens(place: Path) -> None:
    reward = ModelReward(Network(reward_model(place)), batch_size=3)
    reward.load(load_tokenizer(str(place / "model")))
    assert reward.encoder is None
    prompt = torch.tensor([1, 60, 61])
    completions = [Completion([70, 71, 2], True), Completion([72], False)]
    rollout = Rollout([prompt] * 2, [{"prompt": "x"}] * 2, completions, ["fg", "h"], 2)
    assert reward.model is not None
    with torch.no_grad():
        plain = [reward.model.hf(torch.tensor([[1, 60, 61, *c.tokens]])).logits.item() for c in completions]
    assert reward(rollout).tolist() == pytest.approx([(score - 0.3) / 2.0 for score in plain], abs=1e-5)


def test_a_reward_model_may_have_a_tokenizer_of_its_own(place: Path) -> None:
    from lit_align.models.scratch import bpe_tokenizer

    other = bpe_tokenizer(["say a bee"] * 9, 270)
    tiny_folder(place / "other", vocab_size=270)
    other.save_pretrained(place / "other")
    reward = ModelReward(Network(reward_model(place, "other")))
    reward.load(load_tokenizer(str(place / "model")))
    assert reward.encoder is not None
    rows = [{"prompt": [{"role": "user", "content": "say a bee"}]}]
    rollout = Rollout([torch.tensor([1])], rows, [Completion([70], True)], ["a bee"], 1)
    ids = [*reward.encoder.prompt(rows[0]["prompt"]), *reward.encoder.answer(rows[0]["prompt"], "a bee").tokens]
    assert reward.model is not None
    with torch.no_grad():
        plain = reward.model.hf(torch.tensor([ids])).logits.item()
    assert reward(rollout).item() == pytest.approx((plain - 0.3) / 2.0, abs=1e-5)


# Kills: the template of the policy's folder, where the prompts are written in that of the data.
def test_a_reward_is_told_the_template_of_the_prompts(place: Path) -> None:
    told = []

    class Told(FunctionReward):
        def load(self, tokenizer: Any) -> None:
            told.append(tokenizer.chat_template)

    template = load_tokenizer(str(place / "model")).chat_template + "{# another #}"
    fit(module(place, Told(echo)), data(place, chat_template=template), max_epochs=1)
    assert told == [template]


@pytest.mark.parametrize(
    ("scores", "message"), [([1.0], "returned .* scores for"), ([float("nan")] * 12, "returned nan for 12")]
)
def test_a_broken_reward_stops_the_run_and_names_the_prompt(place: Path, scores: list[float], message: str) -> None:
    def broken(rows: list[dict], completions: list[str]) -> list[float]:
        return scores

    with pytest.raises(ValueError, match=message):
        fit(module(place, FunctionReward(broken)), data(place))


@pytest.mark.parametrize("coefficient", [0.0, 2.0])
def test_ptx_mixes_text_into_the_update(place: Path, coefficient: float) -> None:
    text = InstructionDataModule(
        str(place / "model"), [Source(str(place / "demos.json"))], batch_size=2, cache_dir="none"
    )
    ppo = module(place, ptx_coef=coefficient)
    trainer = fit(ppo, data(place, ptx=text))
    assert ("ppo/ptx_loss" in trainer.callback_metrics) == (coefficient > 0)
    plain = module(place)
    fit(plain, data(place))
    same = all(torch.equal(a, b) for a, b in zip(ppo.policy.parameters(), plain.policy.parameters(), strict=True))
    assert same == (coefficient == 0)


# Kills: the policy's graph of the scoring held while the loss on text is computed.
@pytest.mark.parametrize("coefficient", [0.0, 2.0])
def test_before_a_loss_on_text_no_forward_is_kept(place: Path, coefficient: float) -> None:
    text = InstructionDataModule(
        str(place / "model"), [Source(str(place / "demos.json"))], batch_size=2, cache_dir="none"
    )
    ppo = module(place, ptx_coef=coefficient, micro_batch_size=64, epochs=1)
    ppo.__class__ = Recorder
    fit(ppo, data(place, ptx=text))
    assert all((old.scored is None) == (coefficient > 0) for (old,), _ in ppo.seen)


def test_adaptive_kl_moves_the_price(place: Path) -> None:
    ppo = module(place, kl_coef=0.1, kl_target=100.0, kl_horizon=12)
    fit(ppo, data(place))
    assert ppo.kl_coef == pytest.approx(0.1 * (1 - 0.2 * 12 / 12))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gradient_clip_val": 1.0}, "model.max_grad_norm"),
        ({"accumulate_grad_batches": 2}, "model.micro_batch_size"),
        (
            {"callbacks": [ModelCheckpoint(every_n_train_steps=3)], "enable_checkpointing": True},
            "epochs \\* mini_batches",
        ),
    ],
)
def test_trainer_options_that_do_not_apply_are_refused(place: Path, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit(module(place), data(place), **options)


def test_greedy_sampling_is_refused(place: Path) -> None:
    with pytest.raises(ValueError, match="explores by sampling"):
        module(place, sampling=Sampling(6, temperature=0.0))


def test_too_few_micro_batches_say_what_to_lower(place: Path) -> None:
    with pytest.raises(ValueError, match=r"lower model\.micro_batch_size"):
        fit(module(place, mini_batches=4, micro_batch_size=12), data(place))


# Kills: a budget that is not looked at; sequences lost or taken twice; fewer micro-batches than mini-batches.
def test_micro_batches_by_tokens(place: Path) -> None:
    ppo, sizes = module(place, micro_batch_tokens=100, mini_batches=2), []
    score = ppo.score

    def spied(rollout: Rollout, *call: Any) -> Any:
        groups = ppo.micro_batches(rollout, torch.Generator().manual_seed(1))
        assert sorted(torch.cat(list(groups)).tolist()) == list(range(rollout.num_sequences))
        sizes.extend(sum(e.num_tokens for e in rollout.pick(group.tolist()).examples()) for group in groups)
        return score(rollout, *call)

    ppo.score = spied  # type: ignore[method-assign]
    fit(ppo, data(place))
    assert len(sizes) >= 2
    assert max(sizes) <= 100
    assert len(module(place, micro_batch_tokens=10_000, mini_batches=3)._within_budget(torch.arange(5), [9] * 5)) == 3
    with pytest.raises(ValueError, match=r"above model\.micro_batch_tokens \(8\): raise that, or lower"):
        module(place, micro_batch_tokens=8)._within_budget(torch.arange(5), [9] * 5)


# Kills: a run that stops at the first long answer, hours in.
def test_what_may_not_fit_is_refused_before_the_first_rollout(place: Path) -> None:
    prompts = data(place)
    prompts.setup("fit")
    longest = prompts.longest_item().example.num_tokens
    ppo = module(place, micro_batch_tokens=longest + 11)
    with pytest.raises(ValueError, match=rf"\({longest} \+ 2 x 6\), above model.micro_batch_tokens .*: raise that, or"):
        fit(ppo, prompts)
    assert ppo.iteration == 0
    fit(module(place, micro_batch_tokens=10_000, mini_batches=2), data(place))
    with pytest.raises(ValueError, match=r"12 sequences make 6: raise data.batch_size"):
        fit(module(place, micro_batch_tokens=10_000, mini_batches=20), data(place))


def test_gradients_are_clipped_to_the_norm(place: Path) -> None:
    ppo = module(place, max_grad_norm=1e-3)
    ppo.configure_model()
    for parameter in ppo.policy.parameters():
        parameter.grad = torch.ones_like(parameter)
    assert ppo._clip_gradients() > 1
    total = sum(p.grad.square().sum() for p in ppo.policy.parameters()) ** 0.5
    assert total == pytest.approx(1e-3, rel=1e-3)


def test_validation_repeats_its_draws_and_watches_the_monitors(place: Path) -> None:
    ppo = module(place, monitors={"gold": FunctionReward(echo)})
    trainer = Trainer(accelerator="cpu", enable_progress_bar=False, enable_model_summary=False, logger=False)
    first = trainer.validate(ppo, data(place), verbose=False)
    assert trainer.validate(ppo, data(place), verbose=False) == first
    assert first[0]["val/gold"] == first[0]["val/reward"]
    assert first[0]["val/kl"] == pytest.approx(0.0, abs=1e-5)


# Without a value model. A mutant that a test was seen to kill is named above it.


# Kills: a value head made for every advantage; its parameters in the optimizer.
@pytest.mark.parametrize("advantage", WITHOUT_VALUE)
def test_estimators_without_a_value_model_build_and_train_none(place: Path, advantage: str) -> None:
    ppo = module(place, advantage=advantage)
    trainer = fit(ppo, data(place))
    assert {name.split(".")[0] for name, _ in ppo.named_parameters()} == {"policy", "reference"}
    assert len(trainer.optimizers[0].param_groups) == 1
    assert not {"ppo/value_loss", "ppo/explained_variance"} & set(trainer.callback_metrics)
    before = ppo.reference.state_dict()  # the policy as it was
    assert any(not torch.equal(weight, before[name]) for name, weight in ppo.policy.state_dict().items())


def recorded(place: Path, **options: Any) -> tuple[Recorder, Trainer, list[Any]]:
    """One iteration of one step, and what it was trained on; the reference is another model."""
    tiny_folder(place / "other", seed=3)
    ppo = module(place, epochs=1, reference=Network(str(place / "other")), **options)
    ppo.__class__ = Recorder
    ppo.engine = ragged
    trainer = fit(ppo, data(place))
    return ppo, trainer, ppo.seen[0][0]


def ragged(policy: Any, prompts: Any, sampling: Sampling, stop_ids: Any, seed: int) -> list[list[Completion]]:
    """Answers of one to five letters."""
    lengths = [[1 + (3 * i + 2 * k) % 5 for k in range(sampling.samples)] for i in range(len(prompts))]
    return [[Completion([60 + n] * n, False) for n in group] for group in lengths]


def per_answer(old: Any, values_S: Tensor) -> Tensor:
    return torch.zeros(old.batch.num_sequences).index_add(0, old.batch.sequence_S, values_S)


# Kills: KL left out of the compared rewards; the KL of one token; advantages of other prompts' answers.
@pytest.mark.parametrize("advantage", ["rloo", "grpo", "dr_grpo"])
def test_answers_are_compared_with_those_to_the_same_prompt_the_price_of_kl_included(
    place: Path, advantage: str
) -> None:
    reward = FunctionReward(lambda rows, texts: [float(len(text)) for text in texts])
    options = {"sampling": Sampling(6, samples=4), "micro_batch_size": 8, "kl_coef": 0.3, "advantage": advantage}
    ppo, _, experience = recorded(place, reward=reward, **options)
    for old in experience:
        texts = ppo.tokenizer.batch_decode(
            [old.batch.target_S[old.batch.sequence_S == q].tolist() for q in range(old.batch.num_sequences)],
            skip_special_tokens=True,
        )
        score_Q = torch.tensor([float(len(text.strip())) for text in texts])
        reward_EK = (score_Q - 0.3 * per_answer(old, old.logps_S - old.reference_S)).view(-1, 4)
        centred_EK = reward_EK - reward_EK.mean(1, keepdim=True)
        scale = {"rloo": 4 / 3, "grpo": 1 / (reward_EK.std(1, keepdim=True) + 1e-4), "dr_grpo": 1.0}[advantage]
        expected_Q = (centred_EK * scale).flatten()
        assert torch.allclose(old.advantages_S, expected_Q[old.batch.sequence_S], atol=1e-5)


# Kills: whitened by default for all; for none.
@pytest.mark.parametrize("advantage", WITHOUT_VALUE)
def test_reinforce_plus_plus_is_whitened_over_the_rollout_and_the_others_are_not(place: Path, advantage: str) -> None:
    _, _, experience = recorded(place, advantage=advantage)
    advantages_S = torch.cat([old.advantages_S for old in experience])
    white = abs(advantages_S.var(unbiased=False).item() - 1) < 1e-4 and abs(advantages_S.mean().item()) < 1e-5
    assert white == advantage.startswith("reinforce++")


# Kills: the sampled answers' mean for the greedy score; sampling at the temperature of the rollout; baseline unshaped.
def test_remax_compares_with_the_greedy_answer(place: Path) -> None:
    tiny_folder(place / "other", seed=3)
    ppo = module(place, FunctionReward(lambda rows, texts: [float(len(text)) for text in texts]), advantage="remax",
                 kl_coef=0.0, epochs=1, missing_eos_penalty=10.0)  # fmt: skip

    def answers(policy: Any, prompts: Any, sampling: Sampling, stop_ids: Any, seed: int) -> list[list[Completion]]:
        if sampling.temperature == 0:
            assert sampling.samples == 1
            return [[Completion([60] * 5, False)] for _ in prompts]
        return [[Completion([60, 61, 62, 2], True), Completion([60, 2], True)] for _ in prompts]

    ppo.engine = answers
    ppo.__class__ = Recorder
    fit(ppo, data(place))
    for old in ppo.seen[0][0]:
        length_Q = torch.bincount(old.batch.sequence_S)
        # Letters less those of the greedy answer, which did not stop and pays for it.
        assert torch.equal(old.advantages_S, ((length_Q - 1) - (5.0 - 10.0))[old.batch.sequence_S])


# Kills: the price in the reward as well; the loss left out; its sign; its coefficient.
@pytest.mark.parametrize("estimator", ["k2", "k3", "k3+"])
def test_kl_in_the_loss_is_not_in_the_reward_and_pulls_to_the_reference(place: Path, estimator: str) -> None:
    constant = FunctionReward(lambda rows, texts: [1.0] * len(texts))
    tiny_folder(place / "other", seed=3)
    options = {"advantage": "rloo", "kl_in": "loss", "kl_estimator": estimator, "epochs": 5}
    pulled = {}
    for coefficient in (0.0, 1.0):
        ppo = module(place, constant, reference=Network(str(place / "other")), kl_coef=coefficient, **options)
        ppo.__class__ = Recorder
        ppo.optimizer = functools.partial(torch.optim.SGD, lr=1e-4)
        fit(ppo, data(place))
        assert all(torch.equal(old.advantages_S, torch.zeros_like(old.advantages_S)) for old in ppo.seen[0][0])
        pulled[coefficient] = [means["kl_loss"].item() for means in ppo.means]
    assert max(pulled[0.0]) - min(pulled[0.0]) < 1e-5  # sums over micro-batches in another order each epoch
    assert pulled[0.0][0] == pulled[1.0][0] > 0
    assert pulled[1.0] == sorted(set(pulled[1.0]), reverse=True)


# Kills: token for each of the others; sums not divided by their count.
@pytest.mark.parametrize("aggregation", ["token", "sequence", "constant"])
def test_the_loss_is_aggregated_as_told(place: Path, aggregation: str) -> None:
    options = {"advantage": "reinforce++", "whiten_advantages": False, "aggregation": aggregation}
    _, trainer, experience = recorded(place, **options)
    sums = [(per_answer(old, -old.advantages_S), torch.bincount(old.batch.sequence_S)) for old in experience]
    loss_Q, length_Q = (torch.cat(parts) for parts in zip(*sums, strict=True))
    assert len(set(length_Q.tolist())) > 1
    # At ratio 1 the loss of a token is less its advantage.
    expected = {
        "token": loss_Q.sum() / length_Q.sum(),
        "sequence": (loss_Q / length_Q).mean(),
        "constant": (loss_Q / 6).mean(),
    }[aggregation]
    assert trainer.callback_metrics["ppo/policy_loss"].item() == pytest.approx(expected.item(), rel=1e-5)


# Kills: the step that finds it taken; no end to the passes; steps that are not counted; each iteration's first refused.
def test_target_kl_ends_the_passes_of_an_iteration_and_its_steps_are_counted(place: Path) -> None:
    weights = []
    for epochs, target_kl in ((4, 1e-12), (1, None)):
        ppo = module(place, epochs=epochs, target_kl=target_kl, schedule=Cosine(floor=1.0))
        trainer = fit(ppo, data(place), max_epochs=3)
        weights.append(ppo.policy.state_dict())
        assert trainer.global_step == 3 * epochs
        assert ppo.lr_schedulers().last_epoch == 3 * epochs
        assert trainer.callback_metrics.get("ppo/steps_taken") == (1 if target_kl else None)
    # After the first step of four the policy has moved, and the other three are not taken.
    assert all(torch.equal(weight, weights[1][name]) for name, weight in weights[0].items())
    far = module(place, epochs=4, target_kl=1e9)
    assert fit(far, data(place)).callback_metrics["ppo/steps_taken"] == 4


# Kills: policy trained from the start; gradients at 0 and not absent (weight decay); warm-up without an end.
@pytest.mark.parametrize("separate", [False, True])
def test_the_critic_is_warmed_up_before_the_policy_moves(place: Path, separate: bool) -> None:
    ppo = module(place, value_warmup=2, value=Network(reward_model(place)) if separate else None)
    ppo.configure_model()
    start = {name: weight.clone() for name, weight in ppo.state_dict().items()}
    moved = []

    def note(*_: Any) -> None:
        now = ppo.state_dict()
        changed = {name.split(".")[0] for name in start if not torch.equal(now[name], start[name])}
        moved.append(changed)

    ppo.on_train_batch_end = note  # type: ignore[method-assign]
    fit(ppo, data(place), max_epochs=3)
    assert moved == [{"value"}, {"value"}, {"value", "policy"}]


class Again(PPOModule):
    """Computes the first update's forward a second time."""

    def update(self, mini_batch: Any, ptx: Any) -> dict[str, Tensor]:
        return super().update([old._replace(scored=None) for old in mini_batch], ptx)


# Kills: a forward repeated; one that is reused after weights have moved, or for one of several micro-batches.
@pytest.mark.parametrize(("advantage", "separate"), [("gae", True), ("gae", False), ("grpo", False)])
@pytest.mark.parametrize(("micro_batch", "thrifty", "saved"), [(64, False, 1), (64, True, 1), (6, False, 0)])
def test_a_rollout_of_one_micro_batch_is_scored_and_updated_by_one_forward(
    place: Path, advantage: str, separate: bool, micro_batch: int, thrifty: bool, saved: int
) -> None:
    def trained(kind: type[PPOModule]) -> tuple[int, dict[str, Tensor]]:
        value = Network(reward_model(place)) if separate else None
        ppo = module(place, advantage=advantage, value=value, epochs=2, micro_batch_size=micro_batch)
        ppo.__class__ = kind
        ppo.network = Network(str(place / "model"), activation_checkpointing=thrifty)
        ppo.configure_model()
        forwards = 0

        def count(*_: Any) -> None:
            nonlocal forwards
            forwards += 1

        ppo.policy.register_forward_hook(count)
        fit(ppo, data(place), max_epochs=2)
        return forwards, ppo.state_dict()

    (fewer, weights), (forwards, expected) = trained(PPOModule), trained(Again)
    assert forwards - fewer == 2 * saved  # of two iterations
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


# Kills: activations of policy and value model held at once; a value head whose trunk's graph is gone.
@pytest.mark.parametrize(("separate", "order"), [(True, "bvb"), (False, "vb")])
def test_a_value_model_of_its_own_comes_when_the_policy_is_done(place: Path, separate: bool, order: str) -> None:
    ppo = module(place, value=Network(reward_model(place)) if separate else None, epochs=1, micro_batch_size=64)
    done, saved, held = "", 0, []

    class Saved:
        """What a graph keeps for its backward."""

        def __init__(self, tensor: Tensor) -> None:
            nonlocal saved
            saved += 1
            self.tensor = tensor

        def __del__(self) -> None:
            nonlocal saved
            saved -= 1

    def noted(name: str, function: Any) -> Any:
        def call(*arguments: Any) -> Any:
            nonlocal done
            if torch.is_grad_enabled():
                done += name
                held.append(saved)
            return function(*arguments)

        return call

    ppo.values = noted("v", ppo.values)  # type: ignore[method-assign]
    ppo.manual_backward = noted("b", ppo.manual_backward)  # type: ignore[method-assign]
    with torch.autograd.graph.saved_tensors_hooks(Saved, lambda kept: kept.tensor):
        fit(ppo, data(place), max_epochs=1, limit_train_batches=1)
    assert done == order
    assert held[order.index("b")] > 10
    assert (held[order.index("v")] == 0) == separate


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"advantage": "rloo", "value": Network("x")}, r"advantage rloo has no value model: unset model\.value$"),
        ({"advantage": "remax", "value_lr": 1e-5}, r"unset model\.value_lr"),
        ({"advantage": "grpo", "value_warmup": 1}, r"unset model\.value_warmup"),
        ({"advantage": "a2c"}, "unknown advantage 'a2c': choose one of gae, rloo"),
        ({"kl_in": "loss"}, r"set model\.kl_estimator to k2"),
        ({"kl_in": "both"}, "unknown kl_in 'both'"),
        ({"dual_clip": 1.0}, r"model\.dual_clip"),
        *(
            ({"advantage": advantage, "sampling": Sampling(6)}, r"set model\.sampling\.samples to at least 2")
            for advantage in ("rloo", "grpo", "dr_grpo", "reinforce++_baseline")
        ),
    ],
)
def test_options_that_do_not_go_together_are_refused_in_one_line(place: Path, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        module(place, **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("option", "value", "accepted"),
    [
        ("epochs", 0, "at least 1"),
        ("mini_batches", 0, "at least 1"),
        ("micro_batch_size", 0, "at least 1"),
        ("micro_batch_tokens", 0, "at least 1, or null"),
        ("max_grad_norm", 0.0, "above 0, or null"),
        ("ptx_coef", -1.0, "at least 0"),
        ("clip", 0.0, "above 0"),
        ("clip_high", -0.1, "above 0, or null"),
        ("dual_clip", 1.0, "above 1, or null"),
        ("value_clip", 0.0, "above 0, or null"),
        ("value_coef", -0.1, "at least 0"),
        ("value_lr", -1e-5, "at least 0, or null"),
        ("value_warmup", -1, "at least 0"),
        ("discount", 1.1, r"in \[0, 1\]"),
        ("lambda_", -0.1, r"in \[0, 1\]"),
        ("kl_coef", math.nan, "at least 0"),
        ("kl_target", 0.0, "above 0, or null"),
        ("kl_horizon", 0, "above 0"),
        ("target_kl", -1.0, "above 0, or null"),
        ("missing_eos_penalty", -1.0, "at least 0"),
        ("reward_clip", 0.0, "above 0, or null"),
    ],
)
def test_numbers_out_of_range_are_refused(option: str, value: float, accepted: str) -> None:
    with pytest.raises(ValueError, match=rf"^model\.{option} must be {accepted}, got {value}$"):
        PPOModule(Network("nowhere"), FunctionReward(len), **{option: value})


@pytest.mark.parametrize("advantage", ["reinforce++", "remax"])
def test_estimators_that_need_one_answer_to_a_prompt_take_one(place: Path, advantage: str) -> None:
    ppo = module(place, advantage=advantage, sampling=Sampling(6))
    assert fit(ppo, data(place)).callback_metrics["ppo/first_ratio"] == 1
