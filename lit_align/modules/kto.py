"""The reference point of KTO: how far the policy is from its reference, on answers that belong to other prompts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lit_align.models.network import Network
from lit_align.modules.reference import ReferencedModule, live_sums
from lit_align.types import PreferenceBatch


class ReferencePointModule(ReferencedModule):
    """Keeps z, an estimate of KL(policy || reference) in nats an answer, from step to step.

    It is the paper's: the mean log-ratio of prompts with answers to another prompt, at least 0 and without gradient.
    The mean log-ratio of the answers that are trained on would be their implicit reward. Two things are chosen here:

    The other prompt is the next one in the order of training (`PreferenceDataModule.training_item`), where others cycle
    the answers of a micro-batch by one: so the loss does not depend on who shares a micro-batch or a process, and a
    micro-batch of one prompt is as good as any.

    And z is that of the optimizer step *before*: the first micro-batch's loss needs it before the last is computed. It
    starts from 0, its true value where training starts from the reference.

    Args:
        network: the policy.
        kto: whether there is such a point. It costs a forward of both models without gradients.
        options: those of `ReferencedModule`.

    Source: Ethayarajh et al. 2024, "KTO: Model Alignment as Prospect Theoretic Optimization", equation 8 and the
    estimate of z below it.
    """

    reference_point: Tensor

    def __init__(self, network: Network, kto: bool = False, **options: Any) -> None:
        super().__init__(network, **options)
        if kto and self.cache_reference:
            raise ValueError("loss: kto shows the reference other answers in every epoch: unset model.cache_reference")
        self.kto = self.single_answers = kto  # the latter tells the data to keep answers that were judged one by one
        self.register_buffer("reference_point", torch.zeros((), dtype=torch.float64), persistent=kto)
        self._log_ratios: list[Tensor] = []

    def setup(self, stage: str) -> None:
        """Ask the data for prompts with answers to others."""
        super().setup(stage)
        if stage == "fit" and hasattr(self.datamodule, "mismatched"):
            self.datamodule.mismatched = self.kto

    @torch.no_grad()
    def look_at_mismatched(self, batch: PreferenceBatch) -> None:
        """Take down the log-ratios of a micro-batch, for the next step's z."""
        if self.kto and batch.mismatched is not None:
            packed = batch.mismatched
            self._log_ratios.append(self.policy(packed).sums(packed) - live_sums(self, packed))

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """The exact normaliser; and z for the next step.

        Raises:
            ValueError: the batches had nothing to estimate it from.
        """
        super().on_before_optimizer_step(optimizer)
        if self.kto:
            if not self._log_ratios:
                raise ValueError("loss: kto needs batches with `mismatched`, as a PreferenceDataModule makes them")
            self.log("train/reference_point", self.reference_point)
            self.reference_point.copy_(self.mean_over_ranks(torch.cat(self._log_ratios)).clamp(min=0))
            self._log_ratios.clear()
