"""Supervised fine-tuning, and pretraining on plain text."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torchmetrics import MeanMetric

from lit_align.functional.sft import SFT_LOSSES, LossName, sft_loss
from lit_align.models.network import Network
from lit_align.modules.metrics import LossBySource, Means
from lit_align.modules.neftune import noisy_embeddings
from lit_align.modules.policy import PolicyModule
from lit_align.types import PackedBatch


class SFTModule(PolicyModule):
    """Train a language model on demonstrations (Ouyang et al. 2022, step 1).

    The data decides which tokens are scored; a batch lists them. Validation always reports the plain negative
    log-likelihood, over all held-out tokens and per source.

    Args:
        network: the model to train.
        loss: nll, or dft, which weights tokens by their probability (Wu et al. 2025); see `functional/sft.py`.
        neftune_alpha: size of the noise on embeddings in training (Jain et al. 2023); null for none.
        options: options of `PolicyModule`.
    """

    def __init__(
        self, network: Network, loss: LossName = "nll", neftune_alpha: float | None = None, **options: Any
    ) -> None:
        super().__init__(network, **options)
        if neftune_alpha is not None and neftune_alpha < 0:
            raise ValueError(f"neftune_alpha must not be negative, got {neftune_alpha}; null adds no noise")
        if neftune_alpha and network.compile:  # compiled code ignores hooks that are added later
            raise ValueError("neftune_alpha does not reach compiled code: unset it, or network.compile")
        self.loss_function = SFT_LOSSES[loss]
        self.neftune_alpha = neftune_alpha
        self.loss = MeanMetric()
        self.loss_by_source = LossBySource()
        self.means = Means("token_accuracy")

    def micro_step(self, batch: PackedBatch) -> Tensor:
        """Loss of the scored tokens, and their accuracy (share that is the most probable token)."""
        if not self.neftune_alpha:
            return self._loss(batch)
        with noisy_embeddings(self.policy, batch, self.neftune_alpha, seed=self.seed * 1_000_003 + self.global_step):
            return self._loss(batch)

    def _loss(self, batch: PackedBatch) -> Tensor:
        scored = self.policy(batch, hits=True)
        accuracy: Any = {} if scored.hits_S is None else {"token_accuracy": (scored.hits_S.sum(), batch.num_scored)}
        return self.accumulate(*self.loss_function(scored.logps_S), **accuracy)

    def validation_step(self, batch: PackedBatch, batch_idx: int) -> None:
        """Update the negative log-likelihood; its mean is over all held-out tokens."""
        scored = self.policy(batch, hits=True)
        logps_S = scored.logps_S
        loss, tokens = sft_loss(logps_S)
        self.loss.update(loss / tokens, tokens)
        self.loss_by_source.update(logps_S, batch)
        if scored.hits_S is not None:
            self.means.update(token_accuracy=(scored.hits_S.sum(), tokens))

    def on_validation_epoch_end(self) -> None:
        """Log the loss in nats per token, the perplexity and the accuracy."""
        loss = self.loss.compute()
        self.loss.reset()
        self.log(f"{self.stage}/loss", loss, prog_bar=True)
        self.log(f"{self.stage}/perplexity", loss.exp())
        for name, mean in self.means.compute().items():
            self.log(f"{self.stage}/{name}", mean)
        self.means.reset()
        self._log_by_source()

    def _log_by_source(self) -> None:
        """Log the loss of each source, if there are several."""
        datamodule: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        names = getattr(datamodule, "evaluated", [])
        if self.loss_by_source.update_called and len(names) > 1:
            for source, loss in self.loss_by_source.compute().items():
                self.log(f"{self.stage}/loss/{names[source]}", loss)
        self.loss_by_source.reset()

    test_step = validation_step
    on_test_epoch_end = on_validation_epoch_end
