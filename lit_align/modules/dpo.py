"""Direct preference optimisation: train the policy on ranked completions, with an implicit reward model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
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
from lit_align.functional.kto import verdicts
from lit_align.functional.reward import RankedPairs, ranked_pairs
from lit_align.models.network import Network
from lit_align.modules.kto import ReferencePointModule
from lit_align.modules.metrics import Means, PairAccuracy, hits, judged_rewards
from lit_align.types import PreferenceBatch

OF_PAIRS = ("chosen_reward", "rejected_reward", "margin", "chosen_logp", "rejected_logp")
OF_JUDGED = ("desired_reward", "undesired_reward", "judged_accuracy")


class DPOModule(ReferencePointModule):
    """Train a policy on preferences (Rafailov et al. 2023). An example is one prompt with all its ranked completions.

    Each pair of a prompt weighs 1 / C(K, 2). KTO estimates its reference point from prompts paired with completions of
    other prompts; see `ReferencePointModule`. It also accepts completions that are judged one by one (rows of prompt,
    completion and label); all other losses compare completions of one prompt.

    Args:
        network: the policy, an SFT model.
        loss: a name in `functional/dpo_losses.py`. Its docstring says whether the loss sums or averages over tokens,
            which decides the scale of a good beta.
        beta: strength of the KL constraint; null takes the default of the loss.
        label_smoothing: assumed share of wrong labels; null takes the default of the loss.
        coefficients: further coefficients of the loss by name, such as `{gamma: 1.4}` for simpo.
        nll_coef: weight of the negative log-likelihood per token of the better completion, added to any loss (RPO). The
            term that cpo and orpo already contain is separate.
        options: options of `ReferencePointModule` except `kto`.
    """

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
        super().__init__(network, kto=loss == "kto", **options)
        self.loss_name = loss
        self.loss_options = loss_options(loss, beta=beta, label_smoothing=label_smoothing, **(coefficients or {}))
        self.beta = self.loss_options["beta"]
        self.needs_reference = loss not in REFERENCE_FREE
        self.nll_coef = nll_coef
        self.loss = MeanMetric()
        self.accuracy = PairAccuracy()
        self.means = Means(*OF_PAIRS, *(OF_JUDGED if self.kto else ()))

    def configure_model(self) -> None:
        """Load the policy, and the reference if the loss needs it; once."""
        if not hasattr(self, "policy"):
            super().configure_model()
            if self.needs_reference:
                self.load_reference(self.reference_network)

    def pair_logps(self, batch: PreferenceBatch, pairs: RankedPairs) -> tuple[PairLogps, Tensor]:
        """Log-probabilities of each pair, and the log-ratio of each completion. Each completion is computed once."""
        packed = batch.packed
        logps_Q = self.policy(packed).sums(packed)
        reference_Q = self.reference_sums(batch) if self.needs_reference else torch.zeros_like(logps_Q)
        tokens_Q = torch.bincount(packed.sequence_S, minlength=packed.num_sequences)
        return PairLogps.of(pairs, logps_Q, reference_Q, tokens_Q), logps_Q - reference_Q

    def loss_sum(self, batch: PreferenceBatch, pairs: RankedPairs, logps: PairLogps, log_ratio_Q: Tensor) -> Tensor:
        """Loss summed over the prompts of a batch."""
        if self.loss_name in RANKING_LOSSES:
            ranking = log_ratio_Q, batch.rank_Q, batch.packed.example_Q, batch.packed.num_examples
            point = {"reference_point": self.reference_point} if self.kto else {}
            total = RANKING_LOSSES[self.loss_name](*ranking, **point, **self.loss_options).sum()
        else:
            total = (pairs.weight_P * DPO_LOSSES[self.loss_name](logps, **self.loss_options)).sum()
        if self.nll_coef:
            total = total + self.nll_coef * (pairs.weight_P * nll_loss(logps)).sum()
        return total

    def rewards(self, logps: PairLogps) -> tuple[Tensor, Tensor]:
        """Implicit rewards of the better and the worse completions; per token if the loss is. Shapes (P,)."""
        return implicit_rewards(logps.per_token() if self.loss_name in PER_TOKEN else logps, self.beta)

    def measures(self, batch: PreferenceBatch, logps: PairLogps, log_ratio_Q: Tensor) -> dict[str, tuple[Tensor, Any]]:
        """Sums and counts for the log: implicit rewards, margins and log-probs of pairs; with KTO, judged rewards."""
        better_P, worse_P = self.rewards(logps)
        sums_P = {
            "chosen_reward": better_P,
            "rejected_reward": worse_P,
            "margin": better_P - worse_P,
            "chosen_logp": logps.better_P,
            "rejected_logp": logps.worse_P,
        }
        found: dict[str, tuple[Tensor, Any]] = {
            name: (values_P.sum(), values_P.numel()) for name, values_P in sums_P.items()
        }
        if self.kto:
            verdict_Q = verdicts(batch.rank_Q, batch.packed.example_Q)
            found |= judged_rewards(self.beta * log_ratio_Q.detach(), verdict_Q, self.beta * self.reference_point)
        return found

    def micro_step(self, batch: PreferenceBatch) -> Tensor:
        """Loss per prompt, with accuracy and the figures of `measures`."""
        pairs = ranked_pairs(batch.rank_Q, batch.packed.example_Q)
        logps, log_ratio_Q = self.pair_logps(batch, pairs)
        better_P, worse_P = self.rewards(logps)
        self.look_at_mismatched(batch)
        return self.accumulate(
            self.loss_sum(batch, pairs, logps, log_ratio_Q),
            batch.packed.num_examples,
            accuracy=(hits(better_P, worse_P).sum(), better_P.numel()),
            **self.measures(batch, logps, log_ratio_Q),
        )

    def validation_step(self, batch: PreferenceBatch, batch_idx: int) -> None:
        """Update the loss and the accuracy of the implicit reward on pairs."""
        pairs = ranked_pairs(batch.rank_Q, batch.packed.example_Q)
        logps, log_ratio_Q = self.pair_logps(batch, pairs)
        count = batch.packed.num_examples
        self.loss.update(self.loss_sum(batch, pairs, logps, log_ratio_Q) / count, count)
        self.accuracy.update(*self.rewards(logps), pairs.example_P, count)
        self.means.update(**self.measures(batch, logps, log_ratio_Q))

    def on_validation_epoch_end(self) -> None:
        """Log the metrics. Without pairs (completions judged one by one), accuracy is that of judged completions."""
        share, low, high = self.accuracy.compute()
        means = self.means.compute()
        alone = share.isnan() and "judged_accuracy" in means
        self.log(f"{self.stage}/loss", self.loss.compute())
        self.log(f"{self.stage}/accuracy", means["judged_accuracy"] if alone else share, prog_bar=True)
        if not alone:
            self.log(f"{self.stage}/accuracy_low", low)
            self.log(f"{self.stage}/accuracy_high", high)
        for name, mean in means.items():
            self.log(f"{self.stage}/{name}", mean)
        for metric in (self.loss, self.accuracy, self.means):
            metric.reset()

    test_step = validation_step
    on_test_epoch_end = on_validation_epoch_end
