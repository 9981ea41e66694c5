"""Read the folder of an adapter, put it on a model, and write it, in peft's format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from lit_align.models.intact import AGAIN, check_values, read_header, read_json
from lit_align.models.lora import ADAPTER, add_adapter, is_adapter_weight
from lit_align.models.network import INITS
from lit_align.models.reference_logps import fingerprint
from lit_align.models.scalar import normalization
from lit_align.models.sharding import whole
from lit_align.utils.model_folder import adapter_base

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
# How peft names the weights of a model that it has wrapped.
PREFIX = "base_model.model."


class Adapter(NamedTuple):
    """What an adapter's folder holds.

    Attributes:
        folder: where it lies.
        config: of peft.
        state: weights by the names of the model itself; of a reward model with `score.weight`.
        told: texts in the head of the file: the fingerprint of the frozen weights, a reward's mean and deviation.
        base: name or folder of the model that it was trained on.
    """

    folder: Path
    config: LoraConfig
    state: dict[str, Tensor]
    told: dict[str, str]
    base: str


def check_adapter(folder: Path) -> None:
    """Check the files of an adapter's folder before anything is loaded.

    Raises:
        ValueError: one is gone or damaged.
    """
    read_json(folder / CONFIG)
    if not (folder / WEIGHTS).exists():
        raise ValueError(f"{WEIGHTS} is not in the folder {folder}, which has {CONFIG}: {AGAIN}")
    read_header(folder / WEIGHTS)


def read_adapter(name: str | Path) -> Adapter:
    """Read the folder of an adapter.

    Raises:
        ValueError: a file is gone or damaged, or the adapter is of another kind than low-rank ones.
    """
    folder = Path(name)
    check_adapter(folder)
    told = read_json(folder / CONFIG)
    if told.get("peft_type", "LORA") != "LORA":
        raise ValueError(f"{str(name)!r} holds an adapter of type {told['peft_type']}: only LORA is supported")
    if told.get("init_lora_weights", True) not in (*INITS.values(), False):
        raise ValueError(
            f"{str(name)!r} was started by {told['init_lora_weights']!r}, which changes the model below it: convert it "
            "to a plain adapter with peft, or start from the merged model"
        )
    config = LoraConfig.from_pretrained(str(folder))
    config.inference_mode = False
    with safe_open(folder / WEIGHTS, "pt") as file:
        texts = file.metadata() or {}
    state = {key.removeprefix(PREFIX): weight for key, weight in load_file(folder / WEIGHTS).items()}
    # The second matrix of an adapter starts from zero.
    # Untrained, one matrix of each pair is zero: B of a layer, A of an embedding. Check those for finite values only.
    starts = (".lora_B.", "lora_embedding_A")
    matrices = {n: w.reshape(-1) if any(start in n for start in starts) else w for n, w in state.items()}
    check_values(str(folder), matrices)
    return Adapter(folder, config, state, texts, adapter_base(folder))


def attach(
    model: PreTrainedModel, adapter: Adapter, name: str = ADAPTER, whose: str = "lora", of: str = "model"
) -> None:
    """Put an adapter on a model, with the weights that it has; of a reward model's, its head is not touched.

    Args:
        model: as it was when the adapter was trained.
        adapter: what to put there.
        name: of the adapter in the model.
        whose: begins an error.
        of: what the error calls the model.

    Raises:
        ValueError: the adapter does not fit the model.
    """
    folder, state = adapter.folder, {key: w for key, w in adapter.state.items() if key != "score.weight"}
    try:
        add_adapter(model, adapter.config, name)
        loaded: Any = set_peft_model_state_dict(model, state, name)
    except RuntimeError as error:
        raise ValueError(
            f"{whose}: {CONFIG} and {WEIGHTS} do not belong together in {folder} (rank {adapter.config.r} by the one, "
            f"other shapes in the other), or the model is another one: {AGAIN}"
        ) from error
    lacking = [key for key in loaded.missing_keys if is_adapter_weight(key) and name in key.split(".")]
    if names := loaded.unexpected_keys or lacking:
        what = f"has weights without a place in the {of}" if loaded.unexpected_keys else "lacks weights"
        raise ValueError(
            f"{whose}: the adapter in {folder} {what}, {len(names)} of them, the first being {min(names)!r}: "
            "export it again from the run that trained it"
        )


def check_base(
    model: PreTrainedModel,
    adapter: Adapter,
    trusted: bool = False,
    whose: str = "lora",
    needs: tuple[str, str] = ("model", "an adapter needs the weights that it was trained on"),
) -> None:
    """Compare the frozen weights with those that an adapter was trained on; if there is no fingerprint, their places.

    Args:
        model: of which the adapters are not counted.
        adapter: read from its folder.
        trusted: whether an adapter without a fingerprint fits a model from anywhere, as the user says.
        whose: begins an error.
        needs: what the error calls the model, and how it ends.

    Raises:
        ValueError: they are others.
    """
    key, placed = frozen_key(model), same_place(adapter.base, model.name_or_path)
    if not (adapter.told[key] == fingerprint(model.base_model) if key in adapter.told else placed or trusted):
        changed = "; the weights there have changed since" if placed else ""
        raise ValueError(
            f"{whose}: the adapter in {adapter.folder} is one of {adapter.base!r}, and the {needs[0]} is "
            f"{model.name_or_path!r}{changed}: {needs[1]}"
        )


def same_place(one: str, other: str | None) -> bool:
    """Whether two names are of one folder, or of one model of the hub."""
    return one == other or (Path(one).exists() and Path(one).resolve() == Path(other or "").resolve())


def rows_of(adapter: Adapter, names: list[str]) -> int:
    """Rows of the embeddings that an adapter brings along; 0 if it brings none.

    Args:
        adapter: read from its folder.
        names: paths of the embeddings.
    """
    keys = [f"{name}{below}.weight" for name in names for below in ("", ".base_layer")]
    return max((len(adapter.state[key]) for key in keys if key in adapter.state), default=0)


def frozen_key(model: Any) -> str:
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
    told = {"format": "pt"}
    if not hasattr(model, "grown"):  # rows that were added are not in the folder of the base
        told[frozen_key(model)] = fingerprint(model.base_model)
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
    config: dict[str, Any] = {
        key: sorted(value) or None if isinstance(value, set) else value for key, value in settings.items()
    }
    if tied := getattr(model.peft_config[ADAPTER], "modules_to_tie", None):  # peft took them out of the list
        config["modules_to_save"] = [*config["modules_to_save"], *sorted(tied)]
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    else:
        config |= {"task_type": "SEQ_CLS", "modules_to_save": [*(config["modules_to_save"] or ()), "score"]}
    save_file(state, folder / WEIGHTS, metadata=told)
    (folder / CONFIG).write_text(json.dumps(config, indent=2, default=str) + "\n")
