"""Reward modelling: learn a scalar score per completion from rankings of the completions of a prompt."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torchmetrics import CatMetric, MeanMetric, PearsonCorrCoef

from lit_align.functional.reward import (
    bradley_terry_loss,
    davidson_tie_loss,
    davidson_win_loss,
    judged_pairs,
    plackett_luce_loss,
    ranked_pairs,
    regression_loss,
    tied_pairs,
)
from lit_align.models.load import load_scorer
from lit_align.models.network import Network, as_network
from lit_align.models.scalar import ScalarModel
from lit_align.modules.base import AlignModule
from lit_align.modules.metrics import Means, PairAccuracy, hits, score_margin
from lit_align.modules.router import find_router_loss
from lit_align.types import PreferenceBatch


class RewardModule(AlignModule):
    """Train a reward model (Ouyang et al. 2022, step 2). An example is one prompt with all its ranked completions.

    Args:
        network: backbone; the scalar head is new unless the folder has one.
        loss: bradley_terry on all pairs of a prompt, each weighted 1 / C(K, 2), and by the share of annotators if the
            rows have it; plackett_luce on whole rankings; davidson, which is Bradley-Terry with a probability of ties
            (the other losses leave ties out; the data must keep them: `keep_ties`); regression, the squared distance to
            the rows' `scores`, averaged over the completions of a prompt.
        label_smoothing: assumed share of wrong labels (bradley_terry).
        centering: weight of (better + worse)^2, which keeps scores near 0 (bradley_terry).
        log_tie: log of Davidson's tie parameter.
        normalize: after each validation, shift and scale rewards to mean 0 and variance 1 on its completions, in the
            exported folder too, so that a KL coefficient keeps its meaning. null: true except for regression, which
            keeps the scale of the scores.
        options: options of `AlignModule`.
    """

    scorer: ScalarModel

    batch_type = PreferenceBatch
    predict_batch_type = PreferenceBatch

    def __init__(
        self,
        network: Network,
        loss: Literal["bradley_terry", "plackett_luce", "davidson", "regression"] = "bradley_terry",
        label_smoothing: float = 0.0,
        centering: float = 0.0,
        log_tie: float = 0.0,
        normalize: bool | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.network = as_network(network)
        self.loss_name = loss
        self.label_smoothing = label_smoothing
        self.centering = centering
        self.log_tie = log_tie
        self.normalize = loss != "regression" if normalize is None else normalize
        self.loss, self.correlation = MeanMetric(), PearsonCorrCoef()
        self.accuracy, self.length_accuracy = PairAccuracy(), PairAccuracy()
        self.scores = CatMetric()
        self.means = Means("margin")

    def configure_model(self) -> None:
        """Load the backbone and its head, once."""
        if not hasattr(self, "scorer"):
            self.scorer = self.spread(ScalarModel(load_scorer(self.network)))
            self.router_loss = find_router_loss(self.scorer, self.network.router_loss)

    def exported(self) -> Any:
        """The transformers model to export."""
        # A checkpoint restores the buffers, not the configuration that is exported; write them there.
        self.scorer.normalize(self.scorer.mean.item(), self.scorer.std.item())
        return self.scorer.hf

    def loss_sum(self, score_Q: Tensor, batch: PreferenceBatch) -> Tensor:
        """Loss summed over the prompts of a batch."""
        examples_Q = batch.packed.example_Q
        if self.loss_name == "plackett_luce":
            return plackett_luce_loss(score_Q, batch.rank_Q, examples_Q, batch.packed.num_examples).sum()
        if self.loss_name == "regression":
            return (regression_loss(score_Q, batch.every_grade_Q) / torch.bincount(examples_Q)[examples_Q]).sum()
        if self.loss_name == "davidson":
            pairs, ties = ranked_pairs(batch.rank_Q, examples_Q), tied_pairs(batch.rank_Q, examples_Q)
            win_P = davidson_win_loss(score_Q[pairs.better_P], score_Q[pairs.worse_P], self.log_tie)
            tie_P = davidson_tie_loss(score_Q[ties.better_P], score_Q[ties.worse_P], self.log_tie)
            return (pairs.weight_P * win_P).sum() + (ties.weight_P * tie_P).sum()
        pairs, share_P = judged_pairs(batch.rank_Q, examples_Q, batch.share_P)
        scores = score_Q[pairs.better_P], score_Q[pairs.worse_P]
        margin_P = batch.margin_Q[pairs.better_P] - batch.margin_Q[pairs.worse_P]
        loss_P = bradley_terry_loss(*scores, margin_P, self.label_smoothing, self.centering, share_P)
        return (pairs.weight_P * loss_P).sum()

    def micro_step(self, batch: PreferenceBatch) -> Tensor:
        """Loss per prompt, the share of its pairs that is right, by how much, and the mean score of its answers."""
        score_Q = self.scorer(batch.packed)
        pairs = ranked_pairs(batch.rank_Q, batch.packed.example_Q)
        hit_P = hits(score_Q[pairs.better_P], score_Q[pairs.worse_P])
        return self.accumulate(
            self.loss_sum(score_Q, batch),
            batch.packed.num_examples,
            accuracy=(hit_P.sum(), hit_P.numel()),
            margin=score_margin(score_Q, pairs),
            score_mean=(score_Q.detach().sum(), score_Q.numel()),
        )

    def validation_step(self, batch: PreferenceBatch, batch_idx: int) -> None:
        """Loss, accuracy on pairs, and beside it that of a model which only counts tokens and likes few."""
        packed = batch.packed
        score_Q = self.scorer(packed)
        pairs = ranked_pairs(batch.rank_Q, packed.example_Q)
        self.loss.update(self.loss_sum(score_Q, batch) / packed.num_examples, packed.num_examples)
        length_Q = torch.bincount(packed.sequence_S, minlength=packed.num_sequences)
        for metric, values_Q in ((self.accuracy, score_Q), (self.length_accuracy, -length_Q)):
            metric.update(values_Q[pairs.better_P], values_Q[pairs.worse_P], pairs.example_P, packed.num_examples)
        self.scores.update(score_Q)
        self.means.update(margin=score_margin(score_Q, pairs))
        if self.loss_name == "regression":
            self.correlation.update(score_Q, batch.every_grade_Q.to(score_Q))

    def on_validation_epoch_end(self) -> None:
        """Log, and normalise rewards on the held-out answers."""
        share, low, high = self.accuracy.compute()
        shorter, _, _ = self.length_accuracy.compute()
        scores = self.scores.compute()
        self.log(f"{self.stage}/loss", self.loss.compute())
        self.log(f"{self.stage}/accuracy", share, prog_bar=True)
        self.log(f"{self.stage}/accuracy_low", low)
        self.log(f"{self.stage}/accuracy_high", high)
        self.log(f"{self.stage}/shorter_wins", shorter)
        self.log(f"{self.stage}/score_mean", scores.mean())
        self.log(f"{self.stage}/score_std", scores.std())
        if self.loss_name == "regression":
            self.log(f"{self.stage}/correlation", self.correlation.compute(), prog_bar=True)
        for name, mean in self.means.compute().items():
            self.log(f"{self.stage}/{name}", mean)
        for metric in (self.loss, self.accuracy, self.length_accuracy, self.scores, self.correlation, self.means):
            metric.reset()
        if self.normalize and self.trainer.state.fn == "fit" and not self.trainer.sanity_checking:
            self.scorer.normalize(scores.mean().item(), max(scores.std().item(), 1e-6))

    test_step = validation_step
    on_test_epoch_end = on_validation_epoch_end

    def predict_step(self, batch: PreferenceBatch, batch_idx: int) -> list[dict[str, Any]]:
        """Rows for `completions.jsonl`: the normalised rewards of each prompt's answers, in their order."""
        rewards_Q, example_Q = self.scorer.rewards(batch.packed).tolist(), batch.packed.example_Q.tolist()
        rows: list[dict[str, Any]] = [{"rewards": []} for _ in range(batch.packed.num_examples)]
        for reward, example in zip(rewards_Q, example_Q, strict=True):
            rows[example]["rewards"].append(reward)
        return rows
