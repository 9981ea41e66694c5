"""Start from the folder of an adapter: fold it into the model that it was trained on, or go on training it."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from transformers import PreTrainedModel

from lit_align.models.adapters import Adapter, attach, check_base, read_adapter, rows_of
from lit_align.models.merge import merged_model
from lit_align.models.network import Lora, Network
from lit_align.models.tokens import embedding_names, grow
from lit_align.utils.model_folder import is_adapter


def find_folded(network: Network) -> Adapter | None:
    """The adapter that is folded into a model when it is loaded, if there is one.

    Raises:
        ValueError: its folder is damaged, or does not tell which model it was trained on.
    """
    folder = network.adapter or (network.name if is_adapter(network.name) else None)
    if folder is None:
        return None
    adapter = read_adapter(folder)
    if network.adapter is None and not adapter.base:
        raise ValueError(
            f"{folder!r} does not tell which model it was trained on: give that model as network.name and this folder "
            "as network.adapter"
        )
    return adapter


def fold(
    model: PreTrainedModel, adapter: Adapter, missing: list[str], trusted: bool
) -> tuple[PreTrainedModel, list[str]]:
    """A model with an adapter folded into its weights.

    Args:
        model: the one that the adapter was trained on.
        adapter: read from its folder.
        missing: weights that the model's folder lacks: its scalar head.
        trusted: whether the user names the model; else the adapter does.

    Returns:
        The model, and what is still missing.

    Raises:
        ValueError: they do not belong together.
    """
    missing = _put_on(model, adapter, missing, trusted)
    return merged_model(model), missing


def go_on(model: PreTrainedModel, lora: Lora, missing: list[str]) -> list[str]:
    """Put the adapter of `lora.adapter` on a model, to be trained.

    Returns:
        What of `missing` it does not bring along.

    Raises:
        ValueError: an option that is the adapter's own, or an adapter of another model.
    """
    assert lora.adapter is not None
    plain = Lora()
    for field in fields(lora):
        if field.name not in ("adapter", "export", "dropout") and getattr(lora, field.name) != getattr(
            plain, field.name
        ):
            raise ValueError(
                f"lora.{field.name}: the adapter in {lora.adapter!r} goes on as it was made; take the option out"
            )
    adapter = read_adapter(lora.adapter)
    adapter.config.lora_dropout = lora.dropout
    if hasattr(model, "grown") and not rows_of(adapter, embedding_names(model)):
        raise ValueError(
            f"network.new_tokens: the adapter in {lora.adapter!r} trains no embeddings: fold it into the model "
            "(network.adapter) and train another one"
        )
    missing = _put_on(model, adapter, missing, trusted=True)
    head: Any = getattr(model, "score", None)
    if head is not None:
        head.requires_grad_(True)
    return missing


def _put_on(model: Any, adapter: Adapter, missing: list[str], trusted: bool) -> list[str]:
    rows = int(model.get_input_embeddings().weight.shape[0])
    wanted = rows_of(adapter, embedding_names(model))
    if wanted > rows:
        grow(model, range(rows, wanted))
    check_base(model, adapter, trusted)
    scalar = "score.weight" in adapter.state
    # The head is no module that peft has to copy.
    kept = [name for name in adapter.config.modules_to_save or () if name != "score"]
    adapter.config.modules_to_save = kept or None
    attach(model, adapter)
    if scalar and getattr(model, "score", None) is not None:
        model.score.weight.data.copy_(adapter.state["score.weight"])
        model.config.reward_mean = float(adapter.told.get("reward_mean", 0.0))
        model.config.reward_std = float(adapter.told.get("reward_std", 1.0))
        missing = [key for key in missing if not key.startswith("score")]
    return missing


def with_new_tokens(model: PreTrainedModel, lora: Lora) -> Lora:
    """Options of adapters with the embeddings trained whole, if the model has rows for new tokens.

    Raises:
        ValueError: the embeddings are among `lora.targets`: rows that start alike need their own update.
    """
    if not hasattr(model, "grown"):
        return lora
    names = embedding_names(model)
    if both := [name for name in names if name in lora.targets or name.rpartition(".")[2] in lora.targets]:
        raise ValueError(
            f"lora.targets: {both[0]} has rows for new tokens and is trained whole: take the name out of the targets"
        )
    given = [name for name in lora.modules_to_save if not any(path.endswith(name) for path in names)]
    return replace(lora, modules_to_save=[*given, *names])
