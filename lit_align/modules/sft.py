"""Supervised fine-tuning; on plain text, pretraining."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torchmetrics import MeanMetric

from lit_align.functional.sft import sft_loss
from lit_align.models.network import Network
from lit_align.modules.policy import PolicyModule
from lit_align.types import PackedBatch


class SFTModule(PolicyModule):
    """Trains a language model to say what the demonstrations say (Ouyang et al. 2022, step 1).

    Which tokens count is the data's business: a batch lists them.

    Args:
        network: the model to train.
        options: those of `PolicyModule`.
    """

    def __init__(self, network: Network, **options: Any) -> None:
        super().__init__(network, **options)
        self.loss = MeanMetric()

    def micro_step(self, batch: PackedBatch) -> Tensor:
        """Negative log-likelihood of the scored tokens."""
        return self.accumulate(*sft_loss(self.policy(batch).logps_S))

    def validation_step(self, batch: PackedBatch, batch_idx: int) -> None:
        """The same, to be a mean over all tokens of the held-out set."""
        loss, tokens = sft_loss(self.policy(batch).logps_S)
        self.loss.update(loss / tokens, tokens)

    def on_validation_epoch_end(self) -> None:
        """Nats per token, and their exponential."""
        loss = self.loss.compute()
        self.loss.reset()
        self.log(f"{self.stage}/loss", loss, prog_bar=True)
        self.log(f"{self.stage}/perplexity", loss.exp())

    test_step = validation_step
    on_test_epoch_end = on_validation_epoch_end
