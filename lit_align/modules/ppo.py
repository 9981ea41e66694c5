"""Proximal policy optimisation against a reward, with a KL penalty towards the reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from lit_align.functional.advantage import gae, whiten
from lit_align.functional.group import GROUP_ADVANTAGES, remax, returns_to_go
from lit_align.functional.kl import KLEstimator, adapt_kl_coefficient, estimate_kl
from lit_align.functional.logprobs import add_at_ends, sum_by_sequence
from lit_align.functional.ppo import (
    LossAggregation,
    aggregation_weights,
    clip_fraction,
    explained_variance,
    ppo_policy_loss,
    ppo_value_loss,
)
from lit_align.models.language import TokenScores
from lit_align.models.network import Network, as_network
from lit_align.models.roles import load_role, trained_apart
from lit_align.models.scalar import Scorer, ValueHead
from lit_align.modules.on_policy import Experience, OnPolicyModule
from lit_align.modules.options import Advantage, check_ppo
from lit_align.modules.tracking import learning_rate
from lit_align.rewards import Reward
from lit_align.types import PackedBatch, PromptBatch, Rollout


class PPOModule(OnPolicyModule):
    """PPO for language models (Ziegler et al. 2019; Ouyang et al. 2022, step 3), with or without a value model.

    One batch of prompts is one iteration: sample completions, score them, subtract the KL penalty, estimate advantages,
    then take `epochs` passes of `mini_batches` optimizer steps. Optimization is manual: the Trainer's
    `gradient_clip_val` and `accumulate_grad_batches` do not apply; `max_grad_norm` and `micro_batch_size` do.
    Trainer.max_steps counts optimizer steps, `epochs * mini_batches` per iteration.

    Published settings that differ from the defaults:

        RLOO            advantage rloo, sampling.samples 4
        GRPO            advantage grpo, kl_in loss, kl_estimator k3, aggregation sequence
        Dr. GRPO        advantage dr_grpo, aggregation constant, kl_coef 0
        DAPO            advantage grpo, clip_high 0.28, kl_coef 0 (without its dynamic sampling)
        REINFORCE++     advantage reinforce++; its group form: reinforce++_baseline, kl_in loss, kl_estimator k2
        ReMax           advantage remax

    Args:
        network: the policy, an SFT model.
        reward: the reward to maximise: a reward model's folder, a Python function, or any `Reward`.
        value: folder that a value model starts from, usually the reward model's, separate or `shared`; null puts a
            value head on the policy's hidden states. Only used with advantage gae.
        advantage: gae (needs a value model); rloo, grpo, dr_grpo or reinforce++_baseline (need at least two
            completions per prompt); reinforce++ (baseline: the mean of the rollout); or remax (baseline: one more,
            greedy completion per prompt).
        clip: epsilon of the policy ratio.
        clip_high: epsilon above 1; null uses `clip` on both sides.
        dual_clip: c: where the advantage A is negative, the loss is at most -c A; null for no limit.
        aggregation: token, sequence or constant (length: sampling.max_new_tokens); see `aggregation_weights`.
        value_clip: maximum change of a value in its loss; null for no limit.
        value_coef: weight of the value loss.
        value_lr: learning rate of the value parameters; null for the policy's.
        value_warmup: number of first iterations that train only the value parameters.
        discount: gamma. Estimators that compare whole completions (rloo, grpo ...) use 1.
        lambda_: lambda of generalised advantage estimation.
        kl_coef: coefficient of the KL penalty, per nat.
        kl_in: reward subtracts the penalty from the reward of each token; loss adds it to the loss. `estimate_kl` gives
            the gradients, and why the optima differ.
        kl_estimator: estimator of the penalty: k1, k2, k3 or k3+.
        kl_target: target KL per sequence, in nats, reached by adapting `kl_coef`; null keeps it fixed.
        kl_horizon: episodes over which the adaptation acts.
        target_kl: skip further optimizer steps of an iteration once the policy has moved this far from the one that
            sampled, in nats per token; skipped steps still count. Null for no limit.
        missing_eos_penalty: subtracted from the score of a completion that did not stop.
        reward_clip: clip scores to plus or minus this value; null for no limit.
        whiten_rewards: scale the rewards of a rollout to variance 1 and keep their mean.
        whiten_advantages: whiten over the whole rollout and all ranks; null: only with gae and both forms of
            reinforce++.
        options: options of `OnPolicyModule`; `sampling` is how rollouts are drawn, `sampling.samples` per prompt.
    """

    value: Scorer | ValueHead | None

    def __init__(
        self,
        network: Network,
        reward: Reward,
        value: Network | None = None,
        advantage: Advantage = "gae",
        clip: float = 0.2,
        clip_high: float | None = None,
        dual_clip: float | None = None,
        aggregation: LossAggregation = "token",
        value_clip: float | None = 0.2,
        value_coef: float = 0.1,
        value_lr: float | None = None,
        value_warmup: int = 0,
        discount: float = 1.0,
        lambda_: float = 0.95,
        kl_coef: float = 0.05,
        kl_in: Literal["reward", "loss"] = "reward",
        kl_estimator: KLEstimator = "k1",
        kl_target: float | None = None,
        kl_horizon: int = 10_000,
        target_kl: float | None = None,
        missing_eos_penalty: float = 0.0,
        reward_clip: float | None = None,
        whiten_rewards: bool = False,
        whiten_advantages: bool | None = None,
        **options: Any,
    ) -> None:
        super().__init__(network, reward, **options)
        self.value_network, self.advantage = None if value is None else as_network(value), advantage
        self.clip, self.clip_high, self.dual_clip, self.aggregation = clip, clip_high, dual_clip, aggregation
        self.value_clip, self.value_coef, self.value_lr = value_clip, value_coef, value_lr
        self.value_warmup, self.discount, self.lambda_ = value_warmup, discount, lambda_
        self.kl_coef, self.kl_in, self.kl_estimator = kl_coef, kl_in, kl_estimator
        self.kl_target, self.kl_horizon, self.target_kl = kl_target, kl_horizon, target_kl
        self.missing_eos_penalty, self.reward_clip = missing_eos_penalty, reward_clip
        self.whiten_rewards = whiten_rewards
        by_default = advantage in ("gae", "reinforce++", "reinforce++_baseline")
        self.whiten_advantages = by_default if whiten_advantages is None else whiten_advantages
        check_ppo(self)

    def configure_model(self) -> None:
        """Load policy, reference, value model and rewards, once."""
        if hasattr(self, "policy"):
            return
        super().configure_model()
        if self.advantage != "gae":
            self.value = None
        elif self.value_network is not None:
            self.value = load_role(self.value_network, self.policy, "value", trained=True)
        else:
            self.value = ValueHead(self.policy.hf.config.get_text_config().hidden_size).to(self.policy.hf.dtype)
        self.load_rewards()

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Parameter groups of policy and value model; the latter at `value_lr` if it is set."""
        policy, value = trained_apart(self.policy, self.value)
        groups: list[dict[str, Any]] = [{"params": policy}]
        if value:
            groups.append({"params": value, **({} if self.value_lr is None else {"lr": self.value_lr})})
        return groups

    def forward(self, batch: PackedBatch) -> tuple[TokenScores, Tensor | None]:
        """Policy scores of each scored token, and the value of the state before it if there is a value model."""
        scored = self.scores(batch)
        return scored, self.values(batch, scored)

    def scores(self, batch: PackedBatch, entropies: bool = False) -> TokenScores:
        """Policy scores of each scored token, under the distribution that it was sampled from."""
        with self.working_on(batch):
            return self.policy(batch, self.sampling.temperature, self.sampling.top_p, entropies)

    def values(self, batch: PackedBatch, scored: TokenScores) -> Tensor | None:
        """Value of the state before each scored token; None without a value model. Shape (S,)."""
        if isinstance(self.value, ValueHead):
            return self.value(scored.hidden_SH)
        with self.working_on(batch):
            return None if self.value is None else self.value.values(batch)

    # The algorithm.

    def training_step(self, batch: PromptBatch, batch_idx: int) -> None:
        """One iteration: rollout, reward, advantages, epochs of mini-batches."""
        # The seed depends on run, iteration and rank, so a resumed run draws the same samples.
        seed = (self.seed * 1_000_003 + self.iteration) * 1_009 + self.global_rank
        with self.changing_nothing():
            rollout = self.answer(batch, self.sampling, seed)
            greedy_Q = self.greedy_scores(batch) if self.advantage == "remax" else None
        shuffle = torch.Generator().manual_seed(seed)
        experience = self.score(rollout, shuffle, greedy_Q)
        stats: list[dict[str, Tensor]] = []
        for _ in range(self.epochs):
            order = torch.randperm(len(experience), generator=shuffle)
            for chosen in order.tensor_split(self.mini_batches):
                if stats and self.too_far(stats[-1]["approx_kl"]):
                    self.step(take=False)
                else:
                    stats.append(self.update([experience[i] for i in chosen.tolist()], batch.ptx))
                    experience = [old._replace(scored=None) for old in experience]
        logged = [name for name in stats[0] if name != "learning_rate"]
        self.log_all("ppo", {name: torch.stack([s[name] for s in stats]).mean() for name in logged})
        self.log_steps(stats)
        self.log_all("ppo", {"first_ratio": stats[0]["ratio"], "iteration": torch.tensor(float(self.iteration))})
        if self.target_kl is not None:
            taken = len(stats) - int(self.too_far(stats[-1]["approx_kl"]))
            self.log_all("ppo", {"steps_taken": torch.tensor(float(taken))})
        self.iteration += 1

    @torch.no_grad()
    def score(self, rollout: Rollout, shuffle: torch.Generator, greedy_Q: Tensor | None = None) -> list[Experience]:
        """Score a rollout and estimate advantages, in shuffled micro-batches of whole prompts."""
        with self.changing_nothing():
            scores_Q = self.shaped_scores(rollout)
        experience, token_rewards, kls = [], [], []
        entropies: list[Any] = []
        picked = self.micro_batches(rollout, shuffle)
        # If there is a single micro-batch, the first update reuses this forward. DDP needs its own forward, and a ptx
        # loss comes in between.
        reused = len(picked) == 1 and not self.one_backward and not self.ptx_coef
        for sequences in picked:
            batch = self.packed(rollout.pick(sequences.tolist()))
            self.tokens_seen.add(batch)
            with torch.set_grad_enabled(reused):
                scored = self.scores(batch, entropies=True)
            logps_S, values_S = scored.logps_S.detach(), self.values(batch, scored)
            reference_S = self.reference_logps(batch, self.sampling.temperature, self.sampling.top_p)
            if self.kl_in == "reward":
                reward_S = -self.kl_coef * estimate_kl(logps_S, reference_S, self.kl_estimator)
            else:
                reward_S = torch.zeros_like(logps_S)
            # The score goes to the last sampled token: the stop token, or the last one before the cut.
            token_rewards.append(add_at_ends(reward_S, scores_Q[sequences].to(reward_S), batch.sequence_S))
            old = Experience(batch, logps_S, reward_S, reference_S, values_S, scored=scored if reused else None)
            experience.append(old)
            kls.append(sum_by_sequence(logps_S - reference_S, batch.sequence_S, batch.num_sequences))
            entropies.append(scored.entropies_S)
        kl = self.mean_over_ranks(torch.cat(kls))
        self.log_all("ppo", {"kl": kl, "entropy": self.mean_over_ranks(torch.cat(entropies))})
        self.log_all("ppo", {"kl_coef": torch.tensor(self.kl_coef), **self.drift(rollout, picked, experience)})
        if self.kl_target is not None:
            episodes = rollout.num_sequences * self.trainer.world_size
            self.kl_coef = adapt_kl_coefficient(self.kl_coef, kl.item(), self.kl_target, self.kl_horizon, episodes)
        baselines = [None if greedy_Q is None else greedy_Q[sequences] for sequences in picked]
        return self._with_advantages(experience, token_rewards, baselines)

    def shaped_scores(self, rollout: Rollout) -> Tensor:
        """Reward of each completion after the EOS penalty and clipping. Shape (Q,)."""
        scores_Q = self.reward(rollout)
        self.log_all("ppo", self.measures(rollout, scores_Q), prog_bar=("reward",))
        self.log_all("ppo", self.shape_of(rollout, scores_Q))
        return self._shaped(rollout, scores_Q)

    @torch.no_grad()
    def greedy_scores(self, batch: PromptBatch) -> Tensor:
        """Reward of the greedy completion of each completion's prompt. Shape (Q,)."""
        rollout = self.answer(batch, replace(self.sampling, temperature=0.0, samples=1), seed=0)
        scores_E = self._shaped(rollout, self.reward(rollout))
        return scores_E.repeat_interleave(self.sampling.samples)

    def _shaped(self, rollout: Rollout, scores_Q: Tensor) -> Tensor:
        if self.missing_eos_penalty:
            scores_Q = scores_Q - self.missing_eos_penalty * torch.tensor([not c.finished for c in rollout.completions])
        return scores_Q if self.reward_clip is None else scores_Q.clamp(-self.reward_clip, self.reward_clip)

    def _with_advantages(
        self, experience: list[Experience], token_rewards: list[Tensor], baselines: Sequence[Tensor | None]
    ) -> list[Experience]:
        sizes = [len(reward_S) for reward_S in token_rewards]
        rewards_S = torch.cat(token_rewards)
        if self.whiten_rewards:
            rewards_S = whiten(rewards_S, *self.moments_over_ranks(rewards_S), shift_mean=False)
        estimates = [
            self.estimate(reward_S, old, greedy_Q)
            for reward_S, old, greedy_Q in zip(rewards_S.split(sizes), experience, baselines, strict=True)
        ]
        advantages_S = torch.cat([advantages for advantages, _ in estimates])
        if self.value is not None:
            values_S = torch.cat([old.values_S for old in experience])
            returns_S = torch.cat([returns for _, returns in estimates])
            explained = explained_variance(self.over_ranks(values_S), self.over_ranks(returns_S))
            self.log_all("ppo", {"explained_variance": explained})
        if self.whiten_advantages:
            # Over the whole rollout and all ranks, so that the result does not depend on how the work is split.
            advantages_S = whiten(advantages_S, *self.moments_over_ranks(advantages_S))
        return [
            old._replace(advantages_S=advantages, returns_S=returns)
            for old, advantages, (_, returns) in zip(experience, advantages_S.split(sizes), estimates, strict=True)
        ]

    def estimate(self, reward_S: Tensor, old: Experience, greedy_Q: Tensor | None) -> tuple[Tensor, Any]:
        """Advantages of a micro-batch, and the returns for the value loss (None without a value model)."""
        sequence_S, num_sequences = old.batch.sequence_S, old.batch.num_sequences
        if old.values_S is not None:
            return gae(reward_S, old.values_S, sequence_S, num_sequences, self.discount, self.lambda_)
        if self.advantage == "reinforce++":
            return returns_to_go(reward_S, sequence_S, num_sequences, self.discount), None
        if greedy_Q is not None:
            return remax(reward_S, greedy_Q.to(reward_S), sequence_S, num_sequences, self.discount), None
        rewards_Q = sum_by_sequence(reward_S, sequence_S, num_sequences)
        return GROUP_ADVANTAGES[self.advantage](rewards_Q, self.sampling.samples)[sequence_S], None

    def update(self, mini_batch: Sequence[Experience], ptx: PackedBatch | None) -> dict[str, Tensor]:
        """Take one optimizer step on a mini-batch, one micro-batch at a time; return means over its tokens."""
        warming_up = self.iteration < self.value_warmup
        how = self.aggregation, self.sampling.max_new_tokens
        weights = [aggregation_weights(old.batch.sequence_S, old.batch.num_sequences, *how) for old in mini_batch]
        tokens, count = sum(old.batch.num_scored for old in mini_batch), sum(number for _, number in weights)
        # Losses are means over the whole mini-batch on all ranks, independent of micro-batches.
        scale = self.trainer.world_size / self.sum_over_ranks([float(count)])[0].item()
        if not warming_up:
            self.backward_ptx(ptx)
        sums: dict[str, Tensor] = {}
        for i, (old, (weights_S, _)) in enumerate(zip(mini_batch, weights, strict=True)):
            with self.gradient_sync(on=i == len(mini_batch) - 1):
                logps_S, losses = self.gradients(old, weights_S * scale)
            here = {
                **{name: (weights_S * loss_S).sum() for name, loss_S in losses.items()},
                "ratio": (logps_S - old.logps_S).exp().sum(),
                "approx_kl": estimate_kl(old.logps_S, logps_S, "k3").sum(),
                "clip_fraction": clip_fraction(logps_S, old.logps_S, self.clip, self.clip_high) * old.batch.num_scored,
            }
            sums = {name: sums.get(name, 0.0) + value for name, value in here.items()}
        # Means over all ranks, not means of the ranks' means.
        *totals, all_tokens, all_count = self.sum_over_ranks([*sums.values(), float(tokens), float(count)])
        means = {
            name: total / (all_count if name.endswith("_loss") else all_tokens)
            for name, total in zip(sums, totals, strict=True)
        }
        if warming_up:
            # The optimizer skips parameters without a gradient, weight decay included.
            for parameter in self.parameter_groups()[0]["params"]:
                parameter.grad = None
        rate = learning_rate(self.optimizers())
        return {**means, "learning_rate": rate, "grad_norm": self.step(take=not self.too_far(means["approx_kl"]))}

    def gradients(self, old: Experience, weights_S: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Run forward and backward of a micro-batch; return its log-probabilities and its losses per token."""
        scored = self.scores(old.batch) if old.scored is None else old.scored
        logps_S, losses = scored.logps_S.detach(), self.policy_losses(old, scored.logps_S)
        # Run a separate value model after the policy's backward has freed its activations. DDP needs one backward for
        # both.
        apart = self.value is not None and not isinstance(self.value, ValueHead) and not self.one_backward
        if apart:
            self.backward_of(losses, weights_S)
        values_S = self.values(old.batch, scored)
        if values_S is not None:
            losses["value_loss"] = ppo_value_loss(values_S, old.values_S, old.returns_S, self.value_clip)
        self.backward_of({"value_loss": losses["value_loss"]} if apart else losses, weights_S)
        return logps_S, {name: loss_S.detach() for name, loss_S in losses.items()}

    def policy_losses(self, old: Experience, logps_S: Tensor) -> dict[str, Tensor]:
        """Policy losses per token, by name."""
        clips = self.clip, self.clip_high, self.dual_clip
        losses = {"policy_loss": ppo_policy_loss(logps_S, old.logps_S, old.advantages_S, *clips)}
        if self.kl_in == "loss":
            losses["kl_loss"] = estimate_kl(logps_S, old.reference_S, self.kl_estimator)
        return losses

    def backward_of(self, losses: dict[str, Tensor], weights_S: Tensor) -> None:
        """Backward of the weighted sum of losses."""
        coefficients = {"policy_loss": 1.0, "value_loss": self.value_coef, "kl_loss": self.kl_coef}
        loss_S = torch.stack([coefficients[name] * loss for name, loss in losses.items()]).sum(0)
        self.manual_backward((weights_S * loss_S).sum())

    def too_far(self, approx_kl: Tensor) -> bool:
        """True if the policy has moved more than `target_kl` from the one that sampled."""
        return self.target_kl is not None and approx_kl.item() > self.target_kl

    # Checkpoints.

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the iteration and the KL coefficient."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["ppo"] = {"iteration": self.iteration, "kl_coef": self.kl_coef}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the iteration and the KL coefficient."""
        super().on_load_checkpoint(checkpoint)
        self.iteration, self.kl_coef = checkpoint["ppo"]["iteration"], checkpoint["ppo"]["kl_coef"]
