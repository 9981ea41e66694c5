"""Direct preference optimisation: the policy learns from ranked answers, and the reward model stays implicit."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torchmetrics import MeanMetric

from lit_align.functional.dpo import PairLogps, implicit_rewards, nll_loss
from lit_align.functional.dpo_losses import (
    DPO_LOSSES,
    PER_TOKEN,
    RANKING_LOSSES,
    REFERENCE_FREE,
    LossName,
    loss_options,
)
from lit_align.functional.reward import RankedPairs, ranked_pairs
from lit_align.models.network import Network
from lit_align.modules.metrics import PairAccuracy
from lit_align.modules.reference import ReferencedModule
from lit_align.types import PreferenceBatch


class DPOModule(ReferencedModule):
    """Trains a policy on preferences (Rafailov et al. 2023). One example is one prompt with all its ranked answers.

    The pairs of a prompt weigh 1 / C(K, 2) each. KTO's reference point is the mean log-ratio of all answers of the
    optimizer step *before*, at least 0: micro-batches and ranks do not change it, and one step changes it little. It
    starts from 0, its true value where training starts from the reference. Answers that are judged one by one (rows of
    prompt, completion and label) are kept by `data.keep_ties`.

    Args:
        network: the policy, an SFT model.
        loss: a name of `functional/dpo_losses.py`; the function's docstring says whether it sums or averages over
            tokens, which decides what a good beta is.
        beta: how much it costs to leave the reference; null is the loss's own default.
        label_smoothing: how often labels are taken to be wrong; null is the loss's own default.
        coefficients: what else the loss takes, by name, as in `{gamma: 1.4}` for simpo.
        nll_coef: weight of the better answer's negative log-likelihood per token, added to any loss (RPO). That which
            cpo and orpo have of their own is not meant.
        options: those of `ReferencedModule`.
    """

    reference_point: Tensor

    batch_type = PreferenceBatch

    def __init__(
        self,
        network: Network,
        loss: LossName = "sigmoid",
        beta: float | None = None,
        label_smoothing: float | None = None,
        coefficients: dict[str, float] | None = None,
        nll_coef: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__(network, **options)
        self.loss_name = loss
        self.loss_options = loss_options(loss, beta=beta, label_smoothing=label_smoothing, **(coefficients or {}))
        self.beta = self.loss_options["beta"]
        self.needs_reference = loss not in REFERENCE_FREE
        self.nll_coef = nll_coef
        self.loss = MeanMetric()
        self.accuracy = PairAccuracy()
        self.register_buffer("reference_point", torch.zeros((), dtype=torch.float64), persistent=loss == "kto")
        self._log_ratios: list[Tensor] = []

    def configure_model(self) -> None:
        """Load the policy and, if the loss looks at it, the reference; once."""
        if not hasattr(self, "policy"):
            super().configure_model()
            if self.needs_reference:
                self.load_reference(self.reference_network)

    def pair_logps(self, batch: PreferenceBatch, pairs: RankedPairs) -> tuple[PairLogps, Tensor]:
        """Log-probabilities of every pair, and the log-ratio of every answer. Each answer is computed once."""
        packed = batch.packed
        logps_Q = self.policy(packed).sums(packed)
        reference_Q = self.reference_sums(batch) if self.needs_reference else torch.zeros_like(logps_Q)
        tokens_Q = torch.bincount(packed.sequence_S, minlength=packed.num_sequences)
        return PairLogps.of(pairs, logps_Q, reference_Q, tokens_Q), logps_Q - reference_Q

    def loss_sum(self, batch: PreferenceBatch, pairs: RankedPairs, logps: PairLogps, log_ratio_Q: Tensor) -> Tensor:
        """Loss summed over the prompts of a batch."""
        if self.loss_name in RANKING_LOSSES:
            ranking = log_ratio_Q, batch.rank_Q, batch.packed.example_Q, batch.packed.num_examples
            point = {"reference_point": self.reference_point} if self.loss_name == "kto" else {}
            total = RANKING_LOSSES[self.loss_name](*ranking, **point, **self.loss_options).sum()
        else:
            total = (pairs.weight_P * DPO_LOSSES[self.loss_name](logps, **self.loss_options)).sum()
        if self.nll_coef:
            total = total + self.nll_coef * (pairs.weight_P * nll_loss(logps)).sum()
        return total

    def micro_step(self, batch: PreferenceBatch) -> Tensor:
        """Loss per prompt, and its pairs' mean implicit rewards."""
        pairs = ranked_pairs(batch.rank_Q, batch.packed.example_Q)
        logps, log_ratio_Q = self.pair_logps(batch, pairs)
        compared = logps.per_token() if self.loss_name in PER_TOKEN else logps
        better_P, worse_P = implicit_rewards(compared, self.beta)
        self._log_ratios.append(log_ratio_Q.detach())
        return self.accumulate(
            self.loss_sum(batch, pairs, logps, log_ratio_Q),
            batch.packed.num_examples,
            chosen_reward=(better_P.sum(), better_P.numel()),
            rejected_reward=(worse_P.sum(), worse_P.numel()),
            accuracy=((better_P > worse_P).sum(), better_P.numel()),
        )

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """The exact normaliser; and KTO's reference point for the next step."""
        super().on_before_optimizer_step(optimizer)
        if self.loss_name == "kto":
            self.log("train/reference_point", self.reference_point)
            self.reference_point.copy_(self.mean_over_ranks(torch.cat(self._log_ratios)).clamp(min=0))
        self._log_ratios.clear()

    def validation_step(self, batch: PreferenceBatch, batch_idx: int) -> None:
        """Loss, and accuracy of the implicit reward on pairs."""
        pairs = ranked_pairs(batch.rank_Q, batch.packed.example_Q)
        logps, log_ratio_Q = self.pair_logps(batch, pairs)
        count = batch.packed.num_examples
        self.loss.update(self.loss_sum(batch, pairs, logps, log_ratio_Q) / count, count)
        tokens_Q = torch.bincount(batch.packed.sequence_S, minlength=batch.packed.num_sequences)
        score_Q = log_ratio_Q / tokens_Q.clamp(min=1) if self.loss_name in PER_TOKEN else log_ratio_Q
        self.accuracy.update(score_Q, pairs, count)

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
