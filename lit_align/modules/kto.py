"""KTO's reference point: the KL from the reference, estimated on completions of other prompts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lit_align.models.network import Network
from lit_align.modules.reference import ReferencedModule, live_sums
from lit_align.types import PreferenceBatch


class ReferencePointModule(ReferencedModule):
    """Keep z, an estimate of KL(policy || reference) in nats per completion, from step to step.

    As in the paper, z is the mean log-ratio of prompts paired with completions of another prompt, at least 0 and
    without gradient. The mean log-ratio of the trained completions themselves would be their implicit reward. Two
    choices:

    The other prompt is the next one in the order of training (`PreferenceDataModule.training_item`); other libraries
    rotate the completions of a micro-batch by one. The loss therefore does not depend on the other examples of a
    micro-batch or process. The estimate does not depend on micro-batch size.

    z comes from the *previous* optimizer step, because the first micro-batch needs it before the last is computed. It
    starts from 0, its true value if training starts from the reference.

    Args:
        network: the policy.
        kto: whether to estimate z. This costs a forward of both models without gradients.
        options: options of `ReferencedModule`.

    Source: Ethayarajh et al. 2024, "KTO: Model Alignment as Prospect Theoretic Optimization", equation 8 and the
    estimate of z below it.
    """

    reference_point: Tensor

    def __init__(self, network: Network, kto: bool = False, **options: Any) -> None:
        super().__init__(network, **options)
        if kto and self.cache_reference:
            raise ValueError("loss: kto shows the reference other answers in every epoch: unset model.cache_reference")
        self.kto = self.single_answers = kto  # single_answers: the data keeps completions judged one by one
        self.register_buffer("reference_point", torch.zeros((), dtype=torch.float64), persistent=kto)
        self._log_ratios: list[Tensor] = []

    def setup(self, stage: str) -> None:
        """Ask the data module for prompts paired with completions of other prompts."""
        super().setup(stage)
        if stage == "fit" and hasattr(self.datamodule, "mismatched"):
            self.datamodule.mismatched = self.kto

    @torch.no_grad()
    def look_at_mismatched(self, batch: PreferenceBatch) -> None:
        """Collect the log-ratios of a micro-batch for the z of the next step."""
        if self.kto and batch.mismatched is not None:
            packed = batch.mismatched
            self._log_ratios.append(self.policy(packed).sums(packed) - live_sums(self, packed))

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Normalise the gradients, and compute z for the next step.

        Raises:
            ValueError: the batches have no `mismatched` part to estimate z from.
        """
        super().on_before_optimizer_step(optimizer)
        if self.kto:
            if not self._log_ratios:
                raise ValueError("loss: kto needs batches with `mismatched`, as a PreferenceDataModule makes them")
            self.log("train/reference_point", self.reference_point)
            self.reference_point.copy_(self.mean_over_ranks(torch.cat(self._log_ratios)).clamp(min=0))
            self._log_ratios.clear()
