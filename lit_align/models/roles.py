"""Several roles on one backbone: policy, value and reward are adapters on frozen weights that are the reference.

Four models of PPO in the memory of one. A role is a set of adapters by its name and a scalar head; of a reward model
they come from the folder that RewardModule leaves with `lora: {export: adapter}`.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from lit_align.models.intact import AGAIN, check_values, read_header, read_json
from lit_align.models.language import LanguageModel
from lit_align.models.load import check_scalar, draw_head, load_scorer
from lit_align.models.lora import (
    ADAPTER,
    adapter_on,
    adapter_parameters,
    adapter_role,
    add_adapter,
    add_lora,
    has_lora,
    is_adapter_weight,
    without_dropout,
)
from lit_align.models.network import Network
from lit_align.models.reference import fingerprint
from lit_align.models.scalar import ScalarModel, Scorer, normalization
from lit_align.models.sharding import whole
from lit_align.models.trees import Read
from lit_align.types import PackedBatch

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
# How peft names the weights of a model that it has wrapped.
PREFIX = "base_model.model."


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
        elif _same_place(network.name, hf.name_or_path) and network.lora is not None:
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
        check_adapter(folder)
        config = LoraConfig.from_pretrained(str(folder))
        with safe_open(folder / WEIGHTS, "pt") as file:
            told = file.metadata() or {}
        self._check_base(hf, folder, str(config.base_model_name_or_path), told)
        config.modules_to_save, config.lora_dropout = None, 0.0
        add_adapter(hf, config, self.role)
        state = {name.removeprefix(PREFIX): weight for name, weight in load_file(folder / WEIGHTS).items()}
        # The second matrix of an adapter starts from zero.
        check_values(
            str(folder), {n: w if w.dim() < 2 or ".lora_B." not in n else w.view(-1) for n, w in state.items()}
        )
        if "score.weight" not in state:
            raise ValueError(f"{self.role}: the adapter in {folder} has no scalar head: it is not a reward model's")
        self.linear.weight.data.copy_(state.pop("score.weight"))
        try:
            loaded: Any = set_peft_model_state_dict(hf, state, self.role)
        except RuntimeError as error:
            raise ValueError(
                f"{self.role}: {CONFIG} and {WEIGHTS} do not belong together in {folder} (rank {config.r} by the one, "
                f"other shapes in the other): {AGAIN}"
            ) from error
        lacking = [name for name in loaded.missing_keys if ".lora_" in name and adapter_role(name) == self.role]
        if names := loaded.unexpected_keys or lacking:
            what = "has weights without a place in the policy" if loaded.unexpected_keys else "lacks weights"
            raise ValueError(
                f"{self.role}: the adapter in {folder} {what}, {len(names)} of them, the first being {min(names)!r}: "
                "export it again from the run that trained it"
            )
        self.normalize(float(told.get("reward_mean", 0.0)), float(told.get("reward_std", 1.0)))

    def _check_base(self, hf: PreTrainedModel, folder: Path, base: str, told: dict[str, str]) -> None:
        """By the weights themselves where the file tells their fingerprint in this dtype, or else by their place."""
        key, placed = _frozen_key(hf), _same_place(base, hf.name_or_path)
        if not (told[key] == fingerprint(hf.base_model) if key in told else placed):
            changed = "; the weights there have changed since" if placed else ""
            raise ValueError(
                f"{self.role}: the adapter in {folder} is one of {base!r}, and the policy is {hf.name_or_path!r}"
                f"{changed}: shared adapters need the same frozen weights; train the reward model on the policy's"
            )

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


def check_adapter(folder: Path) -> None:
    """Check the files of an adapter's folder before anything is loaded.

    Raises:
        ValueError: one is gone or damaged.
    """
    read_json(folder / CONFIG)
    if not (folder / WEIGHTS).exists():
        raise ValueError(f"{WEIGHTS} is not in the folder {folder}, which has {CONFIG}: {AGAIN}")
    read_header(folder / WEIGHTS)


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


def _same_place(one: str, other: str | None) -> bool:
    """Whether two names are of one folder, or of one model of the hub."""
    return one == other or (Path(one).exists() and Path(one).resolve() == Path(other or "").resolve())


def _frozen_key(model: Any) -> str:
    """Under which the file of an adapter tells the fingerprint of the weights that it was trained on."""
    return f"frozen_{str(model.dtype).removeprefix('torch.')}"


def adapter_file(model: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What the file of a model's adapters holds: weights by peft's names, and a few words.

    Every process of a model in slices must ask for it.

    Args:
        model: a language model, or a sequence classifier with one label, whose head comes along.

    Returns:
        Whole weights on the CPU; and the fingerprint of what is frozen below them, with a reward's mean and deviation.
    """
    own = {n: w for n, w in model.state_dict().items() if is_adapter_weight(n) and ADAPTER in n.split(".")}
    own = {name: whole(weight.detach()).cpu() for name, weight in own.items()}
    # The embeddings below an adapter are the base model's, which its folder holds.
    kept = get_peft_model_state_dict(model, own, ADAPTER, save_embedding_layers=False)
    state = {PREFIX + name: weight.clone(memory_format=torch.contiguous_format) for name, weight in kept.items()}
    told = {"format": "pt", _frozen_key(model): fingerprint(model.base_model)}
    if not model.can_generate():
        state[f"{PREFIX}score.weight"] = whole(model.score.weight.detach()).cpu()
        told |= dict(zip(("reward_mean", "reward_std"), map(repr, normalization(model)), strict=True))
    return state, told


def save_adapter(model: Any, folder: Path, file: tuple[dict[str, Tensor], dict[str, str]] | None = None) -> None:
    """Write a model's adapters in peft's format; of a reward model with its head and its normalisation.

    Args:
        model: a language model, or a sequence classifier with one label.
        folder: where to.
        file: what `adapter_file` gave, if it was asked already.
    """
    state, told = file or adapter_file(model)
    folder.mkdir(parents=True, exist_ok=True)
    settings = model.peft_config[ADAPTER].to_dict() | {"inference_mode": True, "task_type": "CAUSAL_LM"}
    # peft holds names in sets: they have no place in JSON, and another order in every process.
    config = {key: sorted(value) or None if isinstance(value, set) else value for key, value in settings.items()}
    if tied := getattr(model.peft_config[ADAPTER], "modules_to_tie", None):  # peft took them out of the list
        config["modules_to_save"] = [*config["modules_to_save"], *sorted(tied)]
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    else:
        config |= {"task_type": "SEQ_CLS", "modules_to_save": [*(config["modules_to_save"] or ()), "score"]}
    save_file(state, folder / WEIGHTS, metadata=told)
    (folder / CONFIG).write_text(json.dumps(config, indent=2, default=str) + "\n")
