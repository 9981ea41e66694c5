"""One door to transformers: models and tokenizers from a name, a folder or a bare configuration."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from lit_align.accelerate import KERNELS, accelerate
from lit_align.models.experts import route_without_noise
from lit_align.models.held import copied, held_model, set_dropout
from lit_align.models.intact import check_files, check_fit, check_values, read_json
from lit_align.models.lora import add_lora, same_adapters
from lit_align.models.network import Network
from lit_align.models.start import find_folded, fold, go_on, with_new_tokens
from lit_align.models.tokens import add_tokens, grow
from lit_align.models.trees import compile_for_trees
from lit_align.utils import limits
from lit_align.utils.model_folder import adapter_base, find_model, is_adapter


def load_causal_lm(network: Network) -> PreTrainedModel:
    """A causal language model, in training mode, with explicit dtype.

    Raises:
        ValueError: no such folder or hub name, or not a causal language model.
    """
    model, _ = _load(network, AutoModelForCausalLM)
    return model


def check_scalar(network: Network) -> None:
    """Refuse options of language models.

    Raises:
        ValueError: names the option.
    """
    if network.head != "own":
        raise ValueError(f"{network.name}: network.head is of language models: a scalar model has no vocabulary")


def load_scorer(network: Network, need_head: bool = False) -> PreTrainedModel:
    """A backbone with a scalar head, in transformers' own sequence-classification layout with one label.

    From a language model the backbone is taken and a new head is drawn from N(0, 1 / (H + 1)) (Stiennon et al. 2020);
    from a reward model the head comes along.

    Args:
        network: which model.
        need_head: refuse a folder without a trained head, so that no reward is ever computed by a random one.

    Raises:
        ValueError: no such folder or hub name, no sequence-classification class for the architecture, or no head.
    """
    check_scalar(network)
    model, missing = _load(network, AutoModelForSequenceClassification, num_labels=1)
    if network.weights == "random" or any(key.startswith("score") for key in missing):
        if need_head:
            raise ValueError(
                f"{network.name!r} holds no trained scalar head (score.weight): give the folder of a reward model, "
                "as RewardModule exports it"
            )
        draw_head(model.score)
    return model


@torch.no_grad()
def draw_head(head: Any) -> None:
    """A new scalar head's weights, from N(0, 1 / (H + 1)) (Stiennon et al. 2020); in half precision rounded ones."""
    # Drawn in fp32: what torch draws in half precision from a seed differs between its versions.
    drawn = torch.empty_like(head.weight, dtype=torch.promote_types(head.weight.dtype, torch.float32))
    head.weight.copy_(torch.nn.init.normal_(drawn, std=1.0 / math.sqrt(head.in_features + 1)))


def load_tokenizer(name: str, trust_remote_code: bool = False, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a model.

    Raises:
        ValueError: no such folder or hub name, or no usable tokenizer in it; names the file.
    """
    name = find_model(name)
    folder = Path(name)
    if folder.is_dir():
        limits.check_folder(folder)
        if (folder / "tokenizer_config.json").exists():
            read_json(folder / "tokenizer_config.json")
        if not any((folder / file).exists() for file in _TOKENIZERS):
            if is_adapter(name) and adapter_base(name):
                return load_tokenizer(adapter_base(name), trust_remote_code, revision)
            raise ValueError(
                f"{name!r} has no tokenizer ({_TOKENIZERS[0]} or another of its kind): copy those of the model "
                "that it was trained from into it"
            )
    with _explained(name, "the tokenizer of "):
        return AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code, revision=revision)


def tokenizer_of(network: Network) -> PreTrainedTokenizerBase:
    """The tokenizer of a network: of its adapter if that has one, or else of its model, with the new tokens.

    Raises:
        ValueError: no such folder or hub name, or no usable tokenizer in it; names the file.
    """
    adapters = [network.adapter, network.lora.adapter if network.lora is not None else None]
    own = [folder for folder in adapters if folder and any(Path(folder, file).exists() for file in _TOKENIZERS)]
    tokenizer = load_tokenizer([*own, network.name][0], network.trust_remote_code, network.revision)
    add_tokens(tokenizer, network.new_tokens)
    return tokenizer


# What a tokenizer lies in, by its kind; the first is the usual one.
_TOKENIZERS = (
    "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model",
    "tekken.json", "tiktoken.model", "vocab.model",
)  # fmt: skip


def device_of(name: str) -> torch.device:
    """A device by its name; auto is a GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else torch.device(name)


def _load(network: Network, auto_class: Any, **config_options: Any) -> tuple[PreTrainedModel, list[str]]:
    if network.shared:
        raise ValueError(f"{network.name}: network.shared is for the value and the rewards of PPO: leave it out here")
    folded = find_folded(network)
    name = network.name if folded is None or network.adapter else folded.base
    if folded is not None and "score.weight" in folded.state and not config_options:
        raise ValueError(f"{str(folded.folder)!r} is the adapter of a reward model, not of a language model")
    try:
        model, missing = _as_saved(network, name, auto_class, **config_options)
    except ValueError as error:
        if folded is None or network.adapter is not None:
            raise
        raise ValueError(
            f"{network.name!r} is an adapter of {name!r}, which cannot be loaded ({error}): name that model as "
            "network.name and the adapter's folder as network.adapter"
        ) from error
    grow(model, add_tokens(load_tokenizer(network.name), network.new_tokens) if network.new_tokens else ())
    if folded is not None:
        model, missing = fold(model, folded, missing, trusted=network.adapter is not None)
    choose_experts(model)
    kernels = KERNELS if network.kernels is None else network.kernels
    # Attention that was chosen by name is what is used.
    accelerate(model, [name for name in kernels if name != "tree_attention" or network.attention is None])
    # from_pretrained returns a model in eval mode, and Lightning leaves it there: dropout off for the whole run.
    model.train()
    if network.dropout is not None:
        route_without_noise(model)
    if network.lora is not None and network.lora.adapter is not None:
        missing = go_on(model, network.lora, missing)
    elif network.lora is not None:
        add_lora(model, with_new_tokens(model, network.lora))
    if network.activation_checkpointing:
        # Renamed in transformers 5.20. Reentrant checkpointing loses the gradient of adapters below frozen embeddings.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        again = {} if network.lora is None else {"context_fn": same_adapters(model)}
        enable({"use_reentrant": False, **again})
    if network.compile:
        compile_for_trees(model)
    return model, missing


def _as_saved(network: Network, name: str, auto_class: Any, **config_options: Any) -> tuple[PreTrainedModel, list[str]]:
    """The model of a folder or of the hub, or a copy of the one that is given; and the weights that it lacks."""
    dtype = getattr(torch, network.dtype)
    if (given := held_model(name)) is not None:
        model, missing = copied(given, auto_class, dtype, config_options)
        if network.dropout is not None:
            _set_dropout(model.config, network.dropout)
            set_dropout(model, network.dropout)
        if network.attention is not None:
            model.set_attn_implementation(network.attention)
        return model, missing
    remote = {"trust_remote_code": network.trust_remote_code}
    check_files(Path(name), weights=network.weights == "pretrained")
    with _explained(name), _quiet():
        config = AutoConfig.from_pretrained(name, revision=network.revision, **remote, **config_options)
        if network.dropout is not None:
            _set_dropout(config, network.dropout)
        options = {"dtype": dtype, "attn_implementation": network.attention, **remote}
        if network.weights == "random":
            model, missing = auto_class.from_config(config, **options), []
        else:
            # Without an explicit dtype transformers 5 takes the checkpoint's: bf16 weights and bf16 Adam, silently.
            model, info = auto_class.from_pretrained(
                name,
                config=config,
                revision=network.revision,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are errors below, of one line
                **options,
            )
            missing = check_fit(name, model, info, scalar=bool(config_options))
            check_values(name, {key: w for key, w in model.state_dict().items() if key not in missing})
    return model, missing


def choose_experts(model: PreTrainedModel) -> None:
    """Compute the experts of a mixture one by one in float64, for which torch has no grouped product."""
    if model.dtype == torch.float64 and model.get_experts_implementation()[""] == "grouped_mm":
        model.set_experts_implementation("eager")


def _set_dropout(config: PreTrainedConfig, rate: float) -> None:
    """Set every dropout rate of a configuration, whatever the architecture calls it."""
    for key, value in config.to_dict().items():
        if ("drop" in key) and isinstance(value, (int, float)) and not isinstance(value, bool):
            setattr(config, key, rate)


@contextlib.contextmanager
def _explained(name: str, what: str = "") -> Iterator[None]:
    """One line for whatever a damaged folder makes transformers raise: errors of every kind.

    Raises:
        ValueError: says what cannot be loaded, and why.
    """
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError, ImportError):
        raise  # these are no faults of the folder
    except Exception as error:
        if str(error).startswith(repr(name)):
            raise  # one line already
        reason = _reason(error)
        if "trust_remote_code" in str(error):
            raise ValueError(
                f"{name!r} comes with code of its own, which is run only with network.trust_remote_code: true; look at "
                "it before you trust it"
            ) from error
        raise ValueError(
            f"cannot load {what}{name!r} (neither a usable folder nor a name on the hub): {reason}"
        ) from error


def _reason(error: Exception) -> str:
    """The first line of an error, and the second where the first only leads to it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[: 1 + lines[0].endswith(":")]) if lines else type(error).__name__


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' load report and bars: what is missing is checked here and said in one line."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
