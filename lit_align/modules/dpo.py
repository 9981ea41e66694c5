"""Direct preference optimisation: the policy learns from ranked answers, and the reward model stays implicit."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torchmetrics import MeanMetric

from lit_align.functional.dpo import DPO_LOSSES, REFERENCE_FREE, PairLogps, implicit_rewards
from lit_align.functional.reward import RankedPairs, ranked_pairs
from lit_align.models.network import Network
from lit_align.modules.metrics import PairAccuracy
from lit_align.modules.policy import PolicyModule
from lit_align.types import PreferenceBatch


class DPOModule(PolicyModule):
    """Trains a policy on preferences (Rafailov et al. 2023). One example is one prompt with all its ranked answers.

    Args:
        network: the policy, an SFT model.
        loss: a name of `functional/dpo.py`; its docstring says whether it sums or averages over tokens, which decides
            what a good beta is.
        beta: how much it costs to leave the reference.
        label_smoothing: how often labels are taken to be wrong.
        gamma: target margin of SimPO.
        reference: another model than the one training starts from.
        options: those of `PolicyModule`.
    """

    def __init__(
        self,
        network: Network,
        loss: Literal["sigmoid", "ipo", "sigmoid_norm", "simpo"] = "sigmoid",
        beta: float = 0.1,
        label_smoothing: float = 0.0,
        gamma: float = 1.0,
        reference: Network | None = None,
        **options: Any,
    ) -> None:
        super().__init__(network, **options)
        self.loss_name = loss
        self.beta = beta
        self.loss_options: dict[str, float] = {"beta": beta, "label_smoothing": label_smoothing}
        if loss == "simpo":
            self.loss_options["gamma"] = gamma
        self.reference_network = reference
        self.loss = MeanMetric()
        self.accuracy = PairAccuracy()

    def configure_model(self) -> None:
        """Load the policy and, if the loss looks at it, the reference; once."""
        if not hasattr(self, "policy"):
            super().configure_model()
            if self.loss_name not in REFERENCE_FREE:
                self.load_reference(self.reference_network)

    def pair_logps(self, batch: PreferenceBatch, pairs: RankedPairs) -> tuple[PairLogps, Tensor]:
        """Log-probabilities of every pair, and the log-ratio of every answer. Each answer is computed once."""
        packed = batch.packed
        logps_Q = self.policy(packed).sums(packed)
        if self.loss_name in REFERENCE_FREE:
            reference_Q = torch.zeros_like(logps_Q)
        else:
            reference_S = self.reference_logps(packed)
            reference_Q = torch.zeros_like(logps_Q).index_add(0, packed.sequence_S, reference_S)
        tokens_Q = torch.bincount(packed.sequence_S, minlength=packed.num_sequences)
        better, worse = pairs.better_P, pairs.worse_P
        logps = PairLogps(
            logps_Q[better], logps_Q[worse], reference_Q[better], reference_Q[worse], tokens_Q[better], tokens_Q[worse]
        )
        return logps, (logps_Q - reference_Q).detach()

    def loss_sum(self, logps: PairLogps, pairs: RankedPairs) -> Tensor:
        """Loss summed over the prompts of a batch, the pairs of a prompt weighted 1 / C(K, 2)."""
        return (pairs.weight_P * DPO_LOSSES[self.loss_name](logps, **self.loss_options)).sum()

    def training_step(self, batch: PreferenceBatch, batch_idx: int) -> Tensor:
        """Loss per prompt."""
        pairs = ranked_pairs(batch.rank_Q, batch.packed.example_Q)
        logps, _ = self.pair_logps(batch, pairs)
        better_P, worse_P = implicit_rewards(logps, self.beta)
        count = batch.packed.num_examples
        self.log("train/chosen_reward", better_P.mean(), batch_size=count)
        self.log("train/rejected_reward", worse_P.mean(), batch_size=count)
        self.log("train/accuracy", (better_P > worse_P).float().mean(), batch_size=count, prog_bar=True)
        return self.accumulate(self.loss_sum(logps, pairs), count)

    def validation_step(self, batch: PreferenceBatch, batch_idx: int) -> None:
        """Loss, and accuracy of the implicit reward on pairs."""
        pairs = ranked_pairs(batch.rank_Q, batch.packed.example_Q)
        logps, log_ratio_Q = self.pair_logps(batch, pairs)
        count = batch.packed.num_examples
        self.loss.update(self.loss_sum(logps, pairs) / count, count)
        self.accuracy.update(log_ratio_Q, pairs, count)

    def on_validation_epoch_end(self) -> None:
        """Log."""
        share, low, high = self.accuracy.compute()
        self.log(f"{self.stage}/loss", self.loss.compute())
        self.log(f"{self.stage}/accuracy", share, prog_bar=True)
        self.log(f"{self.stage}/accuracy_low", low)
        self.log(f"{self.stage}/accuracy_high", high)
        self.loss.reset()
        self.accuracy.reset()

    test_step = validation_step
    on_test_epoch_end = on_validation_epoch_end
