"""Proximal policy optimisation against a reward, with a price on leaving the reference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from lit_align.functional.advantage import gae, whiten
from lit_align.functional.kl import KLEstimator, adapt_kl_coefficient, estimate_kl
from lit_align.functional.logprobs import sum_by_sequence
from lit_align.functional.packing import pack
from lit_align.functional.ppo import clip_fraction, explained_variance, ppo_policy_loss, ppo_value_loss
from lit_align.functional.sft import sft_loss
from lit_align.models.language import TokenScores
from lit_align.models.load import load_scorer
from lit_align.models.network import Network
from lit_align.models.scalar import ScalarModel, ValueHead
from lit_align.modules.policy import PolicyModule
from lit_align.rewards import Reward
from lit_align.types import PackedBatch, PromptBatch, Rollout


class Experience(NamedTuple):
    """A micro-batch of scored answers: what the sampling policy and the value model said of them.

    Packed once and then used in every epoch as it is: the same rows give the same numbers, so that in the first pass
    the ratio of new to old probabilities is 1 and not 1.0000002.
    """

    batch: PackedBatch
    logps_S: Tensor
    values_S: Tensor
    advantages_S: Tensor
    returns_S: Tensor


class PPOModule(PolicyModule):
    """PPO for language models (Ziegler et al. 2019; Ouyang et al. 2022, step 3).

    One batch of prompts is one iteration: sample answers, score them, price their distance to the reference, estimate
    advantages, then `epochs` passes of `mini_batches` optimizer steps. Optimization is manual, so the Trainer's
    `gradient_clip_val` and `accumulate_grad_batches` do not apply; `max_grad_norm` and `micro_batch_size` do.
    Trainer.max_steps counts optimizer steps, `epochs * mini_batches` of them an iteration.

    Args:
        network: the policy, an SFT model.
        reward: what to maximise: a reward model's folder, a Python function, any `Reward`.
        monitors: rewards that are measured in validation and never trained on.
        value: a value model of its own, initialised from this folder (the reward model's, usually); null puts a value
            head on the policy's trunk.
        reference: another model than the one training starts from.
        epochs: passes over a rollout.
        mini_batches: optimizer steps in a pass.
        micro_batch_size: sequences in one forward and backward.
        clip: epsilon of the policy's ratio.
        value_clip: how far values may move; null for no limit.
        value_coef: weight of the value loss.
        value_lr: learning rate of the value parameters; null for the policy's.
        discount: gamma.
        lambda_: of generalised advantage estimation.
        kl_coef: price of a nat of KL from the reference, taken from the reward of each token.
        kl_estimator: k1, k2 or k3, of that price.
        kl_target: aim at this KL of a sequence, in nats, by adapting `kl_coef`; null keeps it fixed.
        kl_horizon: episodes over which the adaptation acts.
        missing_eos_penalty: subtracted from the score of an answer that did not stop.
        reward_clip: scores are clipped to plus or minus this.
        whiten_rewards: scale the rewards of a rollout to variance 1, their mean kept.
        whiten_advantages: over the whole rollout and all ranks.
        max_grad_norm: gradients are scaled down to this norm; null for no limit.
        ptx_coef: weight of the loss on the data module's `ptx` text (PPO-ptx).
        options: those of `PolicyModule`; `sampling` is how rollouts are drawn.
    """

    value: ScalarModel | ValueHead

    batch_type = PromptBatch

    def __init__(
        self,
        network: Network,
        reward: Reward,
        monitors: dict[str, Reward] | None = None,
        value: Network | None = None,
        reference: Network | None = None,
        epochs: int = 4,
        mini_batches: int = 1,
        micro_batch_size: int = 8,
        clip: float = 0.2,
        value_clip: float | None = 0.2,
        value_coef: float = 0.1,
        value_lr: float | None = None,
        discount: float = 1.0,
        lambda_: float = 0.95,
        kl_coef: float = 0.05,
        kl_estimator: KLEstimator = "k1",
        kl_target: float | None = None,
        kl_horizon: int = 10_000,
        missing_eos_penalty: float = 0.0,
        reward_clip: float | None = None,
        whiten_rewards: bool = False,
        whiten_advantages: bool = True,
        max_grad_norm: float | None = 1.0,
        ptx_coef: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__(network, **options)
        self.automatic_optimization = False
        if self.sampling.temperature == 0:
            raise ValueError("PPO explores by sampling: set sampling.temperature above 0")
        self.reward = reward
        self.monitors: Any = nn.ModuleDict(monitors or {})
        self.value_network, self.reference_network = value, reference
        self.epochs, self.mini_batches, self.micro_batch_size = epochs, mini_batches, micro_batch_size
        self.clip, self.value_clip, self.value_coef, self.value_lr = clip, value_clip, value_coef, value_lr
        self.discount, self.lambda_ = discount, lambda_
        self.kl_coef, self.kl_estimator, self.kl_target, self.kl_horizon = kl_coef, kl_estimator, kl_target, kl_horizon
        self.missing_eos_penalty, self.reward_clip = missing_eos_penalty, reward_clip
        self.whiten_rewards, self.whiten_advantages = whiten_rewards, whiten_advantages
        self.max_grad_norm, self.ptx_coef = max_grad_norm, ptx_coef
        self.optimizer_steps_per_batch = epochs * mini_batches
        self.iteration = 0

    def configure_model(self) -> None:
        """Load policy, reference, value model and rewards, once."""
        if hasattr(self, "policy"):
            return
        super().configure_model()
        self.load_reference(self.reference_network)
        if self.value_network is not None:
            self.value = ScalarModel(load_scorer(self.value_network))
        else:
            self.value = ValueHead(self.policy.hf.config.get_text_config().hidden_size).to(self.policy.hf.dtype)
        for reward in (self.reward, *self.monitors.values()):
            reward.load(self.tokenizer)
            reward.requires_grad_(False)

    def configure_callbacks(self) -> list[Any]:
        """No callbacks: the first hook that sees the Trainer, and so the place to refuse options that do not apply."""
        trainer = self.trainer
        if trainer.gradient_clip_val is not None:
            raise ValueError("PPO clips gradients itself: unset trainer.gradient_clip_val, set model.max_grad_norm")
        if trainer.accumulate_grad_batches != 1:
            raise ValueError(
                "PPO accumulates over micro-batches itself: unset trainer.accumulate_grad_batches, "
                "set model.micro_batch_size and data.batch_size"
            )
        if trainer.max_steps > 0 and trainer.max_steps % self.optimizer_steps_per_batch:
            raise ValueError(
                f"an iteration of PPO takes epochs * mini_batches = {self.optimizer_steps_per_batch} optimizer steps: "
                f"max_steps ({trainer.max_steps}) is no multiple of that"
            )
        if trainer.precision == "16-mixed":
            raise ValueError("PPO clips gradients that fp16's scaler has not unscaled: use bf16-mixed or 32-true")
        for callback in trainer.checkpoint_callbacks:
            every = getattr(callback, "_every_n_train_steps", 0)
            if isinstance(callback, ModelCheckpoint) and getattr(callback, "_train_time_interval", None) is not None:
                raise ValueError("train_time_interval saves nothing under manual optimization: use every_n_train_steps")
            if every and every % self.optimizer_steps_per_batch:
                raise ValueError(
                    f"every_n_train_steps counts optimizer steps, of which PPO takes {self.optimizer_steps_per_batch} "
                    f"between two places to save at (epochs * mini_batches): {every} is no multiple of that"
                )
        return []

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Policy and value parameters, the latter at a rate of their own if asked."""
        own_rate = {} if self.value_lr is None else {"lr": self.value_lr}
        return [
            {"params": [p for p in self.policy.parameters() if p.requires_grad]},
            {"params": [p for p in self.value.parameters() if p.requires_grad], **own_rate},
        ]

    def forward(self, batch: PackedBatch, entropies: bool = False) -> tuple[TokenScores, Tensor]:
        """What the policy says of each scored token, and the value of the state before it."""
        scored = self.policy(batch, self.sampling.temperature, self.sampling.top_p, entropies)
        if isinstance(self.value, ValueHead):
            return scored, self.value(scored.hidden_SH)
        return scored, self.value.values(batch)

    # The algorithm.

    def training_step(self, batch: PromptBatch, batch_idx: int) -> None:
        """One iteration: rollout, reward, advantages, epochs of mini-batches."""
        # A seed of (run, iteration, rank): a resumed run draws what the uninterrupted one would have drawn.
        seed = (self.seed * 1_000_003 + self.iteration) * 1_009 + self.global_rank
        rollout = self.answer(batch, self.sampling, seed)
        shuffle = torch.Generator().manual_seed(seed)
        experience = self.score(rollout, shuffle)
        stats: list[dict[str, Tensor]] = []
        for _ in range(self.epochs):
            order = torch.randperm(len(experience), generator=shuffle)
            for chosen in order.tensor_split(self.mini_batches):
                stats.append(self.update([experience[i] for i in chosen.tolist()], batch.ptx))
        self.log_all("ppo", {name: torch.stack([s[name] for s in stats]).mean() for name in stats[0]})
        self.log_all("ppo", {"first_ratio": stats[0]["ratio"], "iteration": torch.tensor(float(self.iteration))})
        self.iteration += 1

    @torch.no_grad()
    def score(self, rollout: Rollout, shuffle: torch.Generator) -> list[Experience]:
        """Score a rollout and estimate advantages, in micro-batches of whole prompts in shuffled order."""
        scores_Q = self.shaped_scores(rollout)
        micro_batches, token_rewards, kls, entropies = [], [], [], []
        for sequences in self._micro_batches(rollout, shuffle):
            part = rollout.pick(sequences.tolist())
            batch = self._packed(part)
            scored, values_S = self(batch, entropies=True)
            reference_S = self.reference_logps(batch, self.sampling.temperature, self.sampling.top_p)
            reward_S = -self.kl_coef * estimate_kl(scored.logps_S, reference_S, self.kl_estimator)
            # The score belongs to the last token that was sampled: the stop token, or the last before the cut.
            last_Q = torch.bincount(batch.sequence_S, minlength=batch.num_sequences).cumsum(0) - 1
            token_rewards.append(reward_S.index_add(0, last_Q, scores_Q[sequences].to(reward_S)))
            micro_batches.append((batch, scored.logps_S, values_S))
            kls.append(sum_by_sequence(scored.logps_S - reference_S, batch.sequence_S, batch.num_sequences))
            entropies.append(scored.entropies_S)
        kl = self.mean_over_ranks(torch.cat(kls))
        self.log_all("ppo", {"kl": kl, "entropy": self.mean_over_ranks(torch.cat(entropies))})
        self.log_all("ppo", {"kl_coef": torch.tensor(self.kl_coef)})
        if self.kl_target is not None:
            episodes = rollout.num_sequences * self.trainer.world_size
            self.kl_coef = adapt_kl_coefficient(self.kl_coef, kl.item(), self.kl_target, self.kl_horizon, episodes)
        return self._with_advantages(micro_batches, token_rewards)

    def shaped_scores(self, rollout: Rollout) -> Tensor:
        """The reward of each answer, as PPO takes it. Shape (Q,)."""
        scores_Q = self.reward(rollout)
        self.log_all("ppo", self._measures(rollout, scores_Q), prog_bar=("reward",))
        if self.missing_eos_penalty:
            scores_Q = scores_Q - self.missing_eos_penalty * torch.tensor([not c.finished for c in rollout.completions])
        return scores_Q if self.reward_clip is None else scores_Q.clamp(-self.reward_clip, self.reward_clip)

    def _with_advantages(
        self, micro_batches: Sequence[tuple[PackedBatch, Tensor, Tensor]], token_rewards: list[Tensor]
    ) -> list[Experience]:
        sizes = [len(reward_S) for reward_S in token_rewards]
        rewards_S = torch.cat(token_rewards)
        if self.whiten_rewards:
            rewards_S = whiten(rewards_S, *self.moments_over_ranks(rewards_S), shift_mean=False)
        estimates = [
            gae(reward_S, values_S, batch.sequence_S, batch.num_sequences, self.discount, self.lambda_)
            for reward_S, (batch, _, values_S) in zip(rewards_S.split(sizes), micro_batches, strict=True)
        ]
        advantages_S = torch.cat([advantages for advantages, _ in estimates])
        returns_S = torch.cat([returns for _, returns in estimates])
        values_S = torch.cat([values for _, _, values in micro_batches])
        self.log_all("ppo", {"explained_variance": explained_variance(values_S, returns_S)})
        if self.whiten_advantages:
            # Over the whole rollout and all ranks: per mini-batch or rank it would depend on how the work is cut up.
            advantages_S = whiten(advantages_S, *self.moments_over_ranks(advantages_S))
        pieces = zip(micro_batches, advantages_S.split(sizes), returns_S.split(sizes), strict=True)
        return [Experience(*scored, advantages, returns) for scored, advantages, returns in pieces]

    def update(self, mini_batch: Sequence[Experience], ptx: PackedBatch | None) -> dict[str, Tensor]:
        """One optimizer step on a mini-batch, a micro-batch at a time; returns means over its tokens."""
        optimizer: Any = self.optimizers()
        world = self.trainer.world_size
        tokens = sum(experience.batch.num_scored for experience in mini_batch)
        # Losses are means over the tokens of the mini-batch on all ranks, whatever it is cut into.
        scale = world / self.sum_over_ranks([float(tokens)])[0].item()
        self._backward_ptx(ptx)
        sums: dict[str, Tensor] = {}
        for i, old in enumerate(mini_batch):
            with self.gradient_sync(on=i == len(mini_batch) - 1):
                scored, values_S = self(old.batch)
                policy_S = ppo_policy_loss(scored.logps_S, old.logps_S, old.advantages_S, self.clip)
                value_S = ppo_value_loss(values_S, old.values_S, old.returns_S, self.value_clip)
                self.manual_backward((policy_S + self.value_coef * value_S).sum() * scale)
            with torch.no_grad():
                here = {
                    "policy_loss": policy_S.sum(),
                    "value_loss": value_S.sum(),
                    "ratio": (scored.logps_S - old.logps_S).exp().sum(),
                    "approx_kl": estimate_kl(old.logps_S, scored.logps_S, "k3").sum(),
                    "clip_fraction": clip_fraction(scored.logps_S, old.logps_S, self.clip) * old.batch.num_scored,
                }
                sums = {name: sums.get(name, 0.0) + value.detach() for name, value in here.items()}
        norm = self._clip_gradients()
        optimizer.step()
        optimizer.zero_grad()
        scheduler: Any = self.lr_schedulers()
        if scheduler is not None:
            scheduler.step()
        # Means over the tokens of all ranks, not means of the ranks' means.
        *totals, count = self.sum_over_ranks([*sums.values(), float(tokens)])
        return {**{name: total / count for name, total in zip(sums, totals, strict=True)}, "grad_norm": norm}

    # Evaluation.

    def validation_step(self, batch: PromptBatch, batch_idx: int) -> None:
        """Answer held-out prompts, with the same draws every time: reward, monitors, KL, lengths."""
        rollout = self.answer(batch, self.sampling, seed=self.seed + batch_idx * 1_009 + self.global_rank)
        packed = self._packed(rollout)
        scored, _ = self(packed)
        reference_S = self.reference_logps(packed, self.sampling.temperature, self.sampling.top_p)
        kl_Q = sum_by_sequence(scored.logps_S - reference_S, packed.sequence_S, packed.num_sequences)
        measures = {**self._measures(rollout, self.reward(rollout)), "kl": kl_Q.mean()}
        measures |= {name: monitor(rollout).mean() for name, monitor in self.monitors.items()}
        for name, value in measures.items():
            self.log(
                f"{self.stage}/{name}",
                value.to(self.device),
                batch_size=rollout.num_sequences,
                sync_dist=True,
                prog_bar=name == "reward",
            )

    test_step = validation_step

    # Checkpoints.

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """What the iteration depends on beside weights and optimizer."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["ppo"] = {"iteration": self.iteration, "kl_coef": self.kl_coef}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take it up again."""
        super().on_load_checkpoint(checkpoint)
        self.iteration, self.kl_coef = checkpoint["ppo"]["iteration"], checkpoint["ppo"]["kl_coef"]

    def _micro_batches(self, rollout: Rollout, shuffle: torch.Generator) -> Sequence[Tensor]:
        """Sequence numbers of each micro-batch: whole prompts, shuffled."""
        k = rollout.samples
        prompts = torch.randperm(rollout.num_sequences // k, generator=shuffle)
        groups = prompts.split(max(self.micro_batch_size // k, 1))
        if len(groups) < self.mini_batches:
            raise ValueError(
                f"{self.mini_batches} mini-batches need as many micro-batches, and {rollout.num_sequences} sequences "
                f"make {len(groups)}: lower model.micro_batch_size ({self.micro_batch_size})"
            )
        return [(group[:, None] * k + torch.arange(k)).flatten() for group in groups]

    def _packed(self, rollout: Rollout) -> PackedBatch:
        return PackedBatch(*(x.to(self.device) for x in pack(rollout.examples())))

    def _backward_ptx(self, ptx: PackedBatch | None) -> None:
        if ptx is None or not self.ptx_coef:
            return
        # First, not last: under DDP the last backward synchronises, and this one does not reach the value parameters.
        with self.gradient_sync(on=False):
            loss, count = sft_loss(self.policy(ptx).logps_S)
            total = self.sum_over_ranks([float(count)])[0].item()
            self.manual_backward(self.ptx_coef * loss * self.trainer.world_size / total)
        self.log_all("ppo", {"ptx_loss": loss.detach() / count})

    def _clip_gradients(self) -> Tensor:
        parameters = [p for group in self.parameter_groups() for p in group["params"]]
        limit = float("inf") if self.max_grad_norm is None else self.max_grad_norm
        return torch.nn.utils.clip_grad_norm_(parameters, limit)

    def _measures(self, rollout: Rollout, scores_Q: Tensor) -> dict[str, Tensor]:
        return {
            "reward": scores_Q.mean(),
            "length": torch.tensor([float(len(completion.tokens)) for completion in rollout.completions]).mean(),
            "eos": torch.tensor([float(completion.finished) for completion in rollout.completions]).mean(),
        }
