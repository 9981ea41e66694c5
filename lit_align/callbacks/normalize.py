"""The zero and the unit of a reward model's scale, from answers of the user's choice."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from lit_align.callbacks.chosen import chosen, wanted
from lit_align.data.data_module import TextDataModule
from lit_align.data.source import Source, as_sources
from lit_align.data.unjudged import AnswerDataModule
from lit_align.modules.reward import RewardModule


class NormalizeReward(Callback):
    """At the end of fitting, shifts and scales rewards to mean 0 and variance 1 on the answers of some sources.

    References written by people then score 0 in the mean (Ouyang et al. 2022, section 3.5), or what the policy said to
    a set of prompts before training (Ziegler et al. 2019, section 2.1: `lit-align predict` writes it, and
    `format: answers` reads it). It is kept in the exported folder, in place of what RewardModule's own `normalize`
    learns on validation answers.

    Args:
        sources: demonstrations, rankings or plain answers; read with the tokenizer, template and truncation of the
            run's data.
        batch_size: prompts scored together.
    """

    def __init__(self, sources: list[Source], batch_size: int = 16) -> None:
        self.sources = as_sources(sources) or []
        self.batch_size = batch_size
        self.scale: tuple[float, float] | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read the answers now: what is wrong with them should not come out when training is over.

        Raises:
            ValueError: there is no reward model, no text, fewer than two answers, or fewer prompts than processes.
        """
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(pl_module, RewardModule) or not isinstance(data, TextDataModule):
            kinds = f"{type(pl_module).__name__} and {type(data).__name__}"
            raise ValueError(f"NormalizeReward goes with RewardModule and PreferenceDataModule, not with {kinds}")
        same = ["max_length", "truncate", "chat_template", "template", "on_bad_row"]
        same += ["row_tokens", "share_prefix", "packing"]
        self.answers = AnswerDataModule(
            data.given_tokenizer,
            train=[],
            val=self.sources,
            batch_size=self.batch_size,
            cache_dir="none" if data.cache_dir is None else str(data.cache_dir),
            **{name: getattr(data, name) for name in same},
        )
        self.answers.trainer = trainer
        self.answers.setup("validate")
        # Two prompts have two answers.
        some = [store[i] for store in self.answers.stores("val") for i in range(min(len(store), 2))]
        count = sum(len(item.example.branches) for item in some)
        if count < 2:
            raise ValueError(f"NormalizeReward needs two answers at least, and its sources hold {count}")
        self.answers.val_dataloader()  # refuses fewer prompts than there are processes

    @torch.no_grad()
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Score them, each process its share, by the weights that are exported."""
        assert isinstance(pl_module, RewardModule)
        scorer = pl_module.scorer.eval()
        with chosen(trainer, pl_module, wanted(trainer)), trainer.precision_plugin.forward_context():
            batches = (trainer.strategy.batch_to_device(batch) for batch in self.answers.val_dataloader())
            scores = torch.cat([scorer(batch) for batch in batches])
        mean, variance = pl_module.moments_over_ranks(scores)
        deviation = variance.sqrt().item()
        if not (mean.isfinite() and variance.isfinite()):
            raise ValueError(
                f"the scores of the answers have the mean {mean:.4g} and the variance {variance:.4g}: nothing can be "
                "normalised by numbers that are not finite; lower the learning rate, or score in bf16-mixed or fp32"
            )
        # Scores that are all the same have no unit.
        self.scale = mean.item(), deviation if deviation > 1e-6 else 1.0
        scorer.normalize(*self.scale)
        rank_zero_info(f"rewards are 0 where the score is {mean:.4g}, and 1 a deviation of {deviation:.4g} above")


def rescale(trainer: Trainer, module: LightningModule) -> None:
    """Set the scale that a `NormalizeReward` found for the weights that are exported, if there is one."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, NormalizeReward) and callback.scale is not None and isinstance(module, RewardModule):
            module.scorer.normalize(*callback.scale)
