"""A trained reward model as a reward."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lit_align.data.chat import ChatEncoder, template_of
from lit_align.data.source import expand
from lit_align.data.strings import Template
from lit_align.functional.packing import pack
from lit_align.models.language import LanguageModel
from lit_align.models.load import load_scorer, load_tokenizer
from lit_align.models.lora import has_lora
from lit_align.models.network import Network, as_network
from lit_align.models.roles import ScalarAdapter
from lit_align.models.scalar import ScalarModel, Scorer
from lit_align.rewards.protocol import Reward
from lit_align.types import Example, PackedBatch, Rollout, Segment


class ModelReward(Reward):
    """Score completions with a folder that RewardModule exported, or with any sequence classifier with one label.

    If the policy has the same vocabulary and chat template, its tokens are scored directly. Otherwise prompt and
    completion are written with the reward model's own chat template and tokenised again.

    Args:
        network: the reward model, `{name: FOLDER}`.
        batch_size: sequences scored together.
        template: handling of plain-text prompts: `data.template` of the run that trained the reward model.
    """

    def __init__(self, network: Network, batch_size: int = 64, template: Template = "auto") -> None:
        super().__init__()
        self.network = as_network(network)
        self.batch_size = batch_size
        self.template: Template = template
        self.model: Scorer | None = None
        self.encoder: ChatEncoder | None = None

    @property
    def title(self) -> str:
        """The reward model with its folder."""
        return f"the reward model {self.network.name}"

    def attach(self, policy: LanguageModel) -> None:
        """Put the adapter on the policy's backbone if `network.shared` is set; see `Reward`."""
        if self.network.shared and self.model is None:
            self.network.name = expand(self.network.name)
            role = f"reward_{len(policy.hf.peft_config)}" if has_lora(policy) else "reward"
            self.model = ScalarAdapter(policy, self.network, role)

    def load(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Load the frozen weights; see `Reward`."""
        if self.model is not None:
            return
        self.network.name = expand(self.network.name)
        if self.network.shared:
            raise ValueError(f"{self.network.name}: shared needs a policy to share with, as PPO has one")
        self.model = ScalarModel(load_scorer(self.network, need_head=True)).requires_grad_(False)
        own = load_tokenizer(self.network.name, self.network.trust_remote_code, self.network.revision)
        same = own.get_vocab() == tokenizer.get_vocab() and template_of(own) == template_of(tokenizer)
        self.encoder = None if same else ChatEncoder(own, template=self.template)

    @torch.no_grad()
    def forward(self, rollout: Rollout) -> Tensor:
        """Normalised rewards, shape (Q,)."""
        assert self.model is not None, "load() comes first"
        self.model.eval()  # the Trainer may have set training mode, and a reward must not use dropout
        device = self.model.score.weight.device
        whole_prompts = max(self.batch_size // rollout.samples, 1) * rollout.samples
        scores = []
        for part in rollout.split(whole_prompts):
            batch = PackedBatch(*(x.to(device) for x in pack(self._examples(part))))
            scores.append(self.model.rewards(batch).float())
        return torch.cat(scores)

    def _examples(self, rollout: Rollout) -> list[Example]:
        if self.encoder is None:
            return rollout.examples()
        examples = []
        for row, text, completion in zip(rollout.rows, rollout.texts, rollout.completions, strict=True):
            ids = self.encoder.prompt(row["prompt"], row.get("tools"))
            answer = self.encoder.answer(row["prompt"], text, completion.finished, row.get("tools"))
            examples.append(Example(Segment(ids, [False] * len(ids)), [answer]))
        return examples
