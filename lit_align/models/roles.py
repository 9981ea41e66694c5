"""Several roles on one backbone: policy, value and reward are adapters on frozen weights that are the reference.

Four models of PPO in the memory of one. A role is a set of adapters by its name and a scalar head; of a reward model
they come from the folder that RewardModule leaves with `lora: {export: adapter}`.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

from torch import Tensor, nn
from transformers import PreTrainedModel

from lit_align.models.adapters import CONFIG, attach, check_base, read_adapter, same_place
from lit_align.models.adapters import WEIGHTS as WEIGHTS
from lit_align.models.adapters import save_adapter as save_adapter
from lit_align.models.language import LanguageModel
from lit_align.models.load import check_scalar, draw_head, load_scorer
from lit_align.models.lora import adapter_on, adapter_parameters, add_lora, has_lora, without_dropout
from lit_align.models.network import Network
from lit_align.models.scalar import ScalarModel, Scorer
from lit_align.models.trees import Read
from lit_align.types import PackedBatch

# How an error about an adapter of other weights ends here.
NEEDS = "policy", "shared adapters need the same frozen weights; train the reward model on the policy's"


class ScalarAdapter(Scorer):
    """A reward or value model that is adapters and a head on another model's backbone.

    Args:
        policy: whose backbone; trained by adapters itself.
        network: where adapters and head come from; see `Network.shared`.
        role: name of the adapters.
        trained: whether they are.

    Raises:
        ValueError: the policy has no adapters, or the folder holds none for its frozen weights.
    """

    def __init__(self, policy: LanguageModel, network: Network, role: str, trained: bool = False) -> None:
        super().__init__()
        hf = policy.hf
        check_scalar(network)
        if not has_lora(policy):
            raise ValueError(f"{role}: shared means adapters on the policy's frozen weights: train it by network.lora")
        # In a tuple it is no child: its weights are the policy's to move, to save and to count.
        self.owner, self.role, self.trained = (policy,), role, trained
        self.linear = nn.Linear(hf.config.get_text_config().hidden_size, 1, bias=False, dtype=hf.dtype)
        if Path(network.name, CONFIG).exists():
            self._load(hf, Path(network.name))
        elif same_place(network.name, hf.name_or_path) and network.lora is not None:
            add_lora(hf, network.lora, role)
            draw_head(self.linear)
        else:
            raise ValueError(
                f"{role}: {network.name!r} is neither the folder of an adapter (`lora: {{export: adapter}}` of the run "
                f"that trains it) nor the policy's model, {hf.name_or_path!r}, with a `lora`; or leave `shared` out"
            )
        self.linear.to(hf.device)
        for parameter in self.trained_parameters():
            parameter.requires_grad_(trained)

    def _load(self, hf: PreTrainedModel, folder: Path) -> None:
        adapter = read_adapter(folder)
        check_base(hf, adapter, whose=self.role, needs=NEEDS)
        adapter.config.modules_to_save, adapter.config.lora_dropout = None, 0.0
        if "score.weight" not in adapter.state:
            raise ValueError(f"{self.role}: the adapter in {folder} has no scalar head: it is not a reward model's")
        attach(hf, adapter, self.role, self.role, "policy")
        self.linear.weight.data.copy_(adapter.state["score.weight"])
        self.normalize(*(float(adapter.told.get(key, x)) for key, x in (("reward_mean", 0.0), ("reward_std", 1.0))))

    @property
    def score(self) -> nn.Linear:
        """The head."""
        return self.linear

    def hidden(self, batch: PackedBatch, read: Read = "source_S") -> tuple[Tensor, PackedBatch]:
        """States of the backbone with the adapters of this role; see `TreeModel.hidden`."""
        (policy,) = self.owner
        # The policy trains; a reward that is only asked must not drop units.
        with adapter_on(policy.hf, self.role), contextlib.nullcontext() if self.trained else without_dropout(policy):
            return policy.hidden(batch, read)

    def trained_parameters(self) -> list[nn.Parameter]:
        """Head and adapters; the latter are among the parameters of the policy."""
        return [*self.parameters(), *adapter_parameters(self.owner[0], self.role)]


def load_role(network: Network, policy: LanguageModel, role: str, trained: bool = False) -> Scorer:
    """A reward or value model: of its own, or on the policy's backbone.

    Raises:
        ValueError: see `load_scorer` and `ScalarAdapter`.
    """
    if network.shared:
        return ScalarAdapter(policy, network, role, trained)
    return ScalarModel(load_scorer(network, need_head=not trained))


def trained_apart(policy: nn.Module, value: nn.Module | None) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The trained parameters of policy and value, each in order and in one of the two lists."""
    own = value.trained_parameters() if isinstance(value, ScalarAdapter) else list(value.parameters() if value else ())
    own = [parameter for parameter in own if parameter.requires_grad]
    of_value = set(map(id, own))
    return [p for p in policy.parameters() if p.requires_grad and id(p) not in of_value], own
