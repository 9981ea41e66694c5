"""PPO does what it says: each test is a line of what earlier implementations got wrong."""

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
from lit_align.types import Completion, Rollout


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
        ratios = []
        with torch.no_grad():
            for old in mini_batch:
                scored, _ = self(old.batch)
                ratios.append((scored.logps_S - old.logps_S).exp())
        self.seen.append((mini_batch, torch.cat(ratios)))
        return super().update(mini_batch, ptx)


@pytest.mark.parametrize("samples", [1, 3])
def test_the_ratio_of_the_first_pass_is_one(place: Path, samples: int) -> None:
    ppo = module(place, sampling=Sampling(6, samples=samples, temperature=0.7, top_p=0.9), mini_batches=2, epochs=2)
    ppo.__class__ = Recorder
    fit(ppo, data(place))
    first = ppo.seen[0][1]
    assert torch.equal(first, torch.ones_like(first))
    later = ppo.seen[1][1]
    assert not torch.equal(later, torch.ones_like(later))


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
