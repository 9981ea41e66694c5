"""Base of on-policy methods: rewards, micro-batches of whole prompts, optimizer steps, evaluation."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from lit_align.functional.logprobs import sum_by_sequence
from lit_align.functional.packing import best_fit_decreasing, pack, split_bins
from lit_align.functional.ppo import off_policy_drift
from lit_align.functional.sft import sft_loss
from lit_align.models.language import TokenScores
from lit_align.models.network import Network, as_network
from lit_align.modules.options import check_on_policy
from lit_align.modules.policy import PolicyModule
from lit_align.rewards import Reward, as_reward
from lit_align.types import PackedBatch, PromptBatch, Rollout


class Experience(NamedTuple):
    """A micro-batch of scored completions, with the outputs of policy, reference and value model at sampling time.

    It is packed once and reused in every epoch. Equal rows give equal numbers, so in the first pass the ratio of new to
    old probabilities is exactly 1, not 1.0000002.
    """

    batch: PackedBatch
    logps_S: Tensor
    advantages_S: Tensor
    reference_S: Tensor
    values_S: Any = None  # a tensor; None without a value model
    returns_S: Any = None
    scored: TokenScores | None = None  # with its graph, if the first update reuses this forward


class OnPolicyModule(PolicyModule):
    """Base of on-policy methods: everything except the algorithm.

    Args:
        network: the policy, an SFT model.
        reward: the reward to maximise: a reward model's folder, a Python function, or any `Reward`.
        monitors: rewards that are measured in validation and never trained on.
        reference: reference model; null takes the model that training starts from.
        epochs: passes over a rollout.
        mini_batches: optimizer steps per pass.
        micro_batch_size: sequences per forward and backward.
        micro_batch_tokens: tokens per forward and backward, instead of a number of sequences; mini-batches then have
            about equally many micro-batches instead of equally many sequences.
        max_grad_norm: maximum gradient norm; null for no limit.
        ptx_coef: weight of the loss on the data module's `ptx` text (PPO-ptx).
        options: options of `PolicyModule`; `sampling` is how rollouts are drawn.
    """

    batch_type = PromptBatch

    def __init__(
        self,
        network: Network,
        reward: Reward,
        monitors: dict[str, Reward] | None = None,
        reference: Network | None = None,
        epochs: int = 4,
        mini_batches: int = 1,
        micro_batch_size: int = 8,
        micro_batch_tokens: int | None = None,
        max_grad_norm: float | None = 1.0,
        ptx_coef: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__(network, **options)
        self.automatic_optimization = False
        self.reward = as_reward(reward)
        self.monitors: Any = nn.ModuleDict({name: as_reward(one) for name, one in (monitors or {}).items()})
        self.reference_network = None if reference is None else as_network(reference)
        self.epochs, self.mini_batches, self.micro_batch_size = epochs, mini_batches, micro_batch_size
        self.micro_batch_tokens = micro_batch_tokens
        self.max_grad_norm, self.ptx_coef = max_grad_norm, ptx_coef
        self.optimizer_steps_per_batch = epochs * mini_batches
        self.iteration = 0
        # True while nothing that a checkpoint holds has changed in this batch: a run that is asked to stop then need
        # not wait for a slow reward (callbacks/preemption.py).
        self.unchanged = False
        check_on_policy(self)

    def configure_model(self) -> None:
        """Load the policy and its reference, once."""
        if not hasattr(self, "policy"):
            super().configure_model()
            self.load_reference(self.reference_network)

    def load_rewards(self) -> None:
        """Load the rewards and monitors, frozen."""
        # The tokenizer of the data has the chat template that prompts are written in.
        tokenizer = getattr(self.datamodule, "tokenizer", None) or self.tokenizer
        for reward in (self.reward, *self.monitors.values()):
            for part in reward.modules():
                if isinstance(part, Reward):
                    part.attach(self.policy)
            reward.load(tokenizer)
            reward.requires_grad_(False)

    def configure_callbacks(self) -> list[Any]:
        """Refuse Trainer options that do not apply; this is the first hook that sees the Trainer. No callbacks."""
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
            # What Lightning's callback keeps private its key tells.
            told = re.search(r"'every_n_train_steps': (\d+)", callback.state_key)
            every = int(told[1]) if told else 0
            by_time = "'train_time_interval':" in callback.state_key
            by_time = by_time and "'train_time_interval': None" not in callback.state_key
            # A subclass may save by time here, too, as lit_align's does.
            if by_time and getattr(type(callback), "on_train_batch_end", None) is ModelCheckpoint.on_train_batch_end:
                raise ValueError("train_time_interval saves nothing under manual optimization: use every_n_train_steps")
            if every and every % self.optimizer_steps_per_batch:
                raise ValueError(
                    f"every_n_train_steps counts optimizer steps, of which PPO takes {self.optimizer_steps_per_batch} "
                    f"between two places to save at (epochs * mini_batches): {every} is no multiple of that"
                )
        return []

    def on_fit_start(self) -> None:
        """Fail early if the longest prompt plus completions exceeds micro_batch_tokens.

        Raises:
            ValueError: names both sizes, and the options to change.
        """
        super().on_fit_start()
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        if self.micro_batch_tokens is None or not hasattr(data, "longest_item"):
            return
        prompt, samples, room = (
            data.longest_item().example.num_tokens,
            self.sampling.samples,
            self.sampling.max_new_tokens,
        )
        if prompt + samples * room > self.micro_batch_tokens:
            raise ValueError(
                f"the longest prompt and its answers may have {prompt + samples * room:,} tokens ({prompt:,} + "
                f"{samples} x {room:,}), above model.micro_batch_tokens ({self.micro_batch_tokens:,}): raise that, or "
                "lower data.max_length, sampling.max_new_tokens or sampling.samples"
            )

    # Parts of the algorithm.

    @contextlib.contextmanager
    def changing_nothing(self) -> Iterator[None]:
        """Mark the part of a batch that samples and scores, and changes nothing that a checkpoint holds."""
        self.unchanged = True
        yield  # on an error the mark stays, for the callback that saves
        self.unchanged = False

    def micro_batches(self, rollout: Rollout, shuffle: torch.Generator) -> Sequence[Tensor]:
        """Sequence indices of each micro-batch: whole prompts, shuffled."""
        k = rollout.samples
        prompts = torch.randperm(rollout.num_sequences // k, generator=shuffle)
        if self.micro_batch_tokens is None:
            groups = prompts.split(max(self.micro_batch_size // k, 1))
        else:
            groups = self._within_budget(prompts, rollout.tokens_by_prompt())
        if len(groups) < self.mini_batches:
            lower = f"lower model.micro_batch_size ({self.micro_batch_size})"
            way_out = lower if self.micro_batch_tokens is None else "raise data.batch_size"
            raise ValueError(
                f"{self.mini_batches} mini-batches need as many micro-batches, and {rollout.num_sequences} sequences "
                f"make {len(groups)}: {way_out}"
            )
        return [(group[:, None] * k + torch.arange(k)).flatten() for group in groups]

    def _within_budget(self, prompts: Tensor, lengths: Sequence[int]) -> tuple[Tensor, ...]:
        room = self.micro_batch_tokens or 0
        if max(lengths) > room:
            # With a data module, `on_fit_start` has seen to it.
            raise ValueError(
                f"a prompt with its answers has {max(lengths):,} tokens, above model.micro_batch_tokens ({room:,}): "
                "raise that, or lower sampling.max_new_tokens or sampling.samples"
            )
        bins = best_fit_decreasing([lengths[prompt] for prompt in prompts.tolist()], room)
        bins = split_bins(bins, max(len(bins), min(self.mini_batches, len(prompts))))
        return tuple(prompts[sorted(chosen)] for chosen in bins)

    def packed(self, rollout: Rollout) -> PackedBatch:
        """Pack a rollout into a batch on the device."""
        return PackedBatch(*(x.to(self.device) for x in pack(rollout.examples())))

    def backward_ptx(self, ptx: PackedBatch | None) -> None:
        """Accumulate gradients of the loss on pretraining text, if there is any."""
        if ptx is None or not self.ptx_coef:
            return
        # Run it first: under DDP the last backward synchronises, and this one does not reach the value parameters.
        with self.gradient_sync(on=False):
            loss, count = sft_loss(self.policy(ptx).logps_S)
            total = self.sum_over_ranks([float(count)])[0].item()
            self.manual_backward(self.ptx_coef * loss * self.trainer.world_size / total)
        self.log_all("ppo", {"ptx_loss": loss.detach() / count})

    def step(self, take: bool = True) -> Tensor:
        """Take an optimizer step and advance the schedule; return the gradient norm.

        Skipped steps still advance global_step and the schedule, so an iteration always counts
        `optimizer_steps_per_batch` steps.
        """
        optimizer: Any = self.optimizers()
        norm = self._clip_gradients()
        if take:
            optimizer.step()
        else:
            progress = self.trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress
            progress.increment_ready()
            progress.increment_completed()
        optimizer.zero_grad()
        scheduler: Any = self.lr_schedulers()
        if scheduler is not None:
            scheduler.step()
        return norm

    def _clip_gradients(self) -> Tensor:
        parameters = [p for group in self.parameter_groups() for p in group["params"]]
        limit = float("inf") if self.max_grad_norm is None else self.max_grad_norm
        return torch.nn.utils.clip_grad_norm_(parameters, limit)

    def measures(self, rollout: Rollout, scores_Q: Tensor) -> dict[str, Tensor]:
        """Means of rewards, lengths and finished completions, for the log."""
        return {
            "reward": scores_Q.mean(),
            "length": torch.tensor([float(len(completion.tokens)) for completion in rollout.completions]).mean(),
            "eos": torch.tensor([float(completion.finished) for completion in rollout.completions]).mean(),
            **{f"reward_{name}": part_Q.mean() for name, part_Q in self.reward.parts().items()},
        }

    def shape_of(self, rollout: Rollout, scores_Q: Tensor) -> dict[str, Tensor]:
        """Over all ranks: longest completion, share cut at the length limit, share of groups without variance.

        A group whose completions all score the same has advantage 0, so it gives no gradient.
        """
        lengths = [len(completion.tokens) for completion in rollout.completions]
        most = torch.tensor([float(max(lengths, default=0))])
        cut = torch.tensor([float(not completion.finished) for completion in rollout.completions])
        found = {"length_max": self.over_ranks(most).max(), "cut": self.mean_over_ranks(cut)}
        if rollout.samples > 1:
            groups_EK = scores_Q.reshape(-1, rollout.samples)
            alike_E = (groups_EK == groups_EK[:, :1]).all(1)
            found["groups_without_variance"] = self.mean_over_ranks(alike_E.double())
        return found

    def log_steps(self, stats: Sequence[dict[str, Tensor]]) -> None:
        """Log an iteration as other methods log a step: rate and gradient norm are means over its steps."""
        seen = self.tokens_seen.settle(self.sum_over_ranks(self.tokens_seen.latest()))
        means = {name: torch.stack([s[name] for s in stats]).mean() for name in ("learning_rate", "grad_norm")}
        self.log_tracked({**means, **seen})

    def drift(self, rollout: Rollout, picked: Sequence[Tensor], experience: Sequence[Experience]) -> dict[str, Tensor]:
        """Drift between engine and trainer before the first step, over all ranks; empty if the engine reports no logps.

        Args:
            rollout: the completions.
            picked: sequences of each micro-batch.
            experience: the micro-batches; `logps_S` are log-probabilities as training computes them.
        """
        sampled = rollout.pick(torch.cat(list(picked)).tolist()).sampled_logps()
        if sampled is None:
            return {}
        logps_S = torch.cat([old.logps_S for old in experience])
        ratio_S, outside_S = off_policy_drift(logps_S, torch.tensor(sampled, device=logps_S.device).to(logps_S))
        return {"drift_ratio": self.mean_over_ranks(ratio_S), "drift_outside": self.mean_over_ranks(outside_S)}

    # Evaluation.

    def validation_step(self, batch: PromptBatch, batch_idx: int) -> None:
        """Sample completions of held-out prompts with fixed seeds; log reward, monitors, KL and lengths."""
        rollout = self.answer(batch, self.sampling, seed=self.seed + batch_idx * 1_009 + self.global_rank)
        packed = self.packed(rollout)
        scored = self.policy(packed, self.sampling.temperature, self.sampling.top_p)
        reference_S = self.reference_logps(packed, self.sampling.temperature, self.sampling.top_p)
        kl_Q = sum_by_sequence(scored.logps_S - reference_S, packed.sequence_S, packed.num_sequences)
        measures = {**self.measures(rollout, self.reward(rollout)), "kl": kl_Q.mean()}
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
