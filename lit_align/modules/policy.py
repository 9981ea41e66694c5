"""Base of the methods that train a language model: the policy, its reference, and sampling."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lit_align.models.held import held_model
from lit_align.models.language import LanguageModel
from lit_align.models.load import load_causal_lm, tokenizer_of
from lit_align.models.lora import adapters_off, has_lora, without_dropout
from lit_align.models.network import Network, as_network
from lit_align.models.tokens import check_new_tokens
from lit_align.modules.base import AlignModule
from lit_align.modules.memory import memory_for
from lit_align.modules.router import find_router_loss
from lit_align.rollout import Engine, Sampling, TransformersEngine, as_rollout, stop_tokens
from lit_align.types import PackedBatch, PromptBatch, Rollout


class PolicyModule(AlignModule):
    """Base of SFT, DPO and PPO.

    Args:
        network: the model to train.
        sampling: sampling options of `lit-align predict`, and of training in PPO.
        seed: seed of the sampling.
        engine: sampling engine; null for the model itself (`TransformersEngine`).
        base: optimizer, schedule and lr_scheduler; see `AlignModule`.
    """

    policy: LanguageModel
    tokenizer: PreTrainedTokenizerBase

    def __init__(
        self,
        network: Network,
        sampling: Sampling | None = None,
        seed: int = 0,
        engine: Engine | None = None,
        **base: Any,
    ) -> None:
        super().__init__(**base)
        self.network = as_network(network)
        self.sampling = sampling or Sampling()
        self.seed = seed
        self.engine: Engine = engine or TransformersEngine()
        self.reference: LanguageModel | None = None

    def setup(self, stage: str) -> None:
        """Refuse a GPU kernel on a CPU.

        Raises:
            ValueError: names the option to change.
        """
        super().setup(stage)
        if self.network.head == "liger" and self.trainer.strategy.root_device.type == "cpu":
            raise ValueError("network.head: liger is a kernel of GPUs: leave it out, or set trainer.accelerator: gpu")

    def configure_model(self) -> None:
        """Load the policy, once."""
        if not hasattr(self, "policy"):
            self.policy = self.spread(LanguageModel(load_causal_lm(self.network), self.network.head))
            none = None if self.automatic_optimization else type(self).__name__
            self.router_loss = find_router_loss(self.policy, self.network.router_loss, none)
            if held_model(self.network.name) is not None and hasattr(self.datamodule, "tokenizer"):
                self.tokenizer = self.datamodule.tokenizer  # a model object may have no folder to load one from
            else:
                self.tokenizer = tokenizer_of(self.network)
            check_new_tokens(self.network.new_tokens, self.tokenizer, getattr(self.datamodule, "tokenizer", None))

    def exported(self) -> Any:
        """The transformers model to export."""
        return self.policy.hf

    def stop_ids(self) -> list[int]:
        """Tokens that end a completion: those of the model, the tokenizer and the data's chat template."""
        return stop_tokens(self.policy, self.tokenizer, getattr(self.datamodule, "stop_ids", []))

    @property
    def datamodule(self) -> Any:
        """Data module of the Trainer; None if there is none."""
        try:
            return self.trainer.datamodule  # type: ignore[attr-defined]
        except RuntimeError:  # there is no Trainer
            return None

    def answer(self, batch: PromptBatch, sampling: Sampling, seed: int) -> Rollout:
        """Sample completions of prompts. The same seed gives the same completions."""
        count = min(len(batch.prompts), sampling.batch_size) * sampling.samples
        with memory_for(f"a rollout of {count:,} answers at once", "model.sampling.batch_size"):
            answers = self.engine(self.policy, batch.prompts, sampling, self.stop_ids(), seed)
        return as_rollout(batch.prompts, batch.rows, answers, self.tokenizer)

    # The reference: the policy before training.

    @property
    def reference_is_below(self) -> bool:
        """True if the policy without its adapters is the model that training started from."""
        return has_lora(self.policy) and self.network.lora is not None and self.network.lora.adapter is None

    def load_reference(self, network: Network | None) -> None:
        """Load the reference as a frozen copy. If the policy's adapters can be switched off, no copy is needed.

        Args:
            network: reference model; None takes the model that training starts from.
        """
        if network is None and self.reference_is_below:
            return
        start = network or self.network
        # If training continues an adapter, the reference has that adapter as it was at the start.
        below = start.adapter or (start.lora.adapter if start.lora is not None else None)
        frozen = replace(start, lora=None, adapter=below, activation_checkpointing=False)
        if frozen.weights == "random":
            raise ValueError("the reference cannot start from random weights: give it a folder or a hub name")
        self.reference = self.spread(LanguageModel(load_causal_lm(frozen), frozen.head).requires_grad_(False))

    @torch.no_grad()
    def reference_logps(self, batch: PackedBatch, temperature: float = 1.0, top_p: float = 1.0) -> Tensor:
        """Log-probabilities of the scored tokens under the reference, in nats. Shape (S,)."""
        if self.reference is None:
            with adapters_off(self.policy), without_dropout(self.policy):
                return self.policy(batch, temperature, top_p).logps_S
        # Lightning sets every child to training mode before each epoch.
        return self.reference.eval()(batch, temperature, top_p).logps_S

    def predict_step(self, batch: PromptBatch, batch_idx: int) -> list[dict[str, Any]]:
        """Rows for `completions.jsonl`: the prompt's row with its sampled completions."""
        seed = self.seed + 1_000_003 * self.global_rank + batch_idx
        rollout = self.answer(batch, self.sampling, seed)
        k = self.sampling.samples
        return [
            {
                **row,
                "completions": rollout.texts[i * k : (i + 1) * k],
                "finished": [completion.finished for completion in rollout.completions[i * k : (i + 1) * k]],
            }
            for i, row in enumerate(batch.rows)
        ]
