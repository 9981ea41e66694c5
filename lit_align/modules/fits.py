"""Whether the data fits the model: positions, the embedding's rows, and whose tokenizer it is."""

from __future__ import annotations

import re
from typing import Any

from lightning.pytorch.utilities import rank_zero_info
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_align.models.load import load_tokenizer

# Names of tables with a row for each position.
_TABLE = re.compile(r"(^|\.)(wpe|embed_positions|position_embeddings?|pos_embed(ding)?s?)$")


def positions_of(model: PreTrainedModel) -> tuple[int | None, bool]:
    """How many positions a model has, and whether it fails beyond them, as a model with a table of them does.

    Returns:
        The number, None where there is no limit; and True for a limit that cannot be exceeded.
    """
    config: Any = model.config.get_text_config()
    told = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    tables = [module.num_embeddings for name, module in model.named_modules() if _is_table(name, module)]
    # Sines and cosines that are computed once (GPT-J, CodeGen).
    tables += [buffer.shape[0] for name, buffer in model.named_buffers() if _TABLE.search(name) and buffer.dim() > 1]
    if tables:
        return min([*tables, *([told] if told else [])]), True
    if getattr(config, "model_type", "") == "mpt":
        return config.max_seq_len, True
    rotates = any(name.endswith("inv_freq") for name, _ in model.named_buffers())
    return (told, False) if rotates else (None, False)


def _is_table(name: str, module: nn.Module) -> bool:
    return isinstance(module, nn.Embedding) and bool(_TABLE.search(name))


def check_data(module: Any, data: Any) -> list[str]:
    """Compare a module's model with the data that it is about to see.

    Args:
        module: an `AlignModule` whose model is loaded.
        data: its data module, set up.

    Returns:
        What is unusual and may be meant, a sentence each.

    Raises:
        ValueError: a sequence longer than the model's positions, a token beyond its embedding, or the tokenizer of
            another model; says what to set.
    """
    model = module.exported() if hasattr(module, "exported") else None
    if not isinstance(model, PreTrainedModel) or not hasattr(data, "longest_sequences"):
        return []
    network = getattr(module, "network", None)
    before = [] if network is None else data.unusual(network.name)
    return [*_lengths(module, model, data), *_tokens(model, data), *_tokenizer(module, data), *before]


def _lengths(module: Any, model: PreTrainedModel, data: Any) -> list[str]:
    limit, hard = positions_of(model)
    new = module.sampling.max_new_tokens if hasattr(module, "sampling") else 0
    found = [(name, tokens, new if answered else 0) for name, tokens, answered in data.longest_sequences()]
    name, longest, more = max(found, key=lambda one: one[1] + one[2], default=("", 0, 0))
    if limit is None or longest + more <= limit:
        return []
    answers = f", and answers up to model.sampling.max_new_tokens ({more:,}) more" if more else ""
    says = f"{name}: the longest sequence has {longest:,} tokens{answers}; the model has {limit:,} positions"
    room = f"set data.max_length to {limit - more:,} or less" if limit > more else "lower model.sampling.max_new_tokens"
    if hard:
        raise ValueError(f"{says}: {room}")
    return [f"{says}, and was not trained beyond them: {room}, if that is not meant"]


def _tokens(model: PreTrainedModel, data: Any) -> list[str]:
    embedding: Any = model.get_input_embeddings()
    rows = embedding.weight.shape[0]
    tokenizer = data.tokenizer
    if len(tokenizer) <= rows:
        return []
    name, token = max(data.largest_tokens(), key=lambda found: found[1], default=("", 0))
    says = f"the tokenizer ({data.tokenizer_name}) has {len(tokenizer):,} tokens, the model's embedding {rows:,} rows"
    if token >= rows:
        text = tokenizer.convert_ids_to_tokens(token)
        raise ValueError(
            f"{name}: token {token:,} ({text!r}) is none of the model's: {says}; set data.tokenizer to its own"
        )
    return [f"{says}; no token of the data is beyond them"]


def _tokenizer(module: Any, data: Any) -> list[str]:
    """Whether the model's own tokenizer numbers tokens as the data's does."""
    network = getattr(module, "network", None)
    if network is None or network.weights == "random":
        return []
    own: PreTrainedTokenizerBase | None = getattr(module, "tokenizer", None)
    if own is None:
        try:
            own = load_tokenizer(network.name, network.trust_remote_code, network.revision)
        except (OSError, ValueError):  # a folder without one
            return []
    theirs, ours = data.tokenizer.get_vocab(), own.get_vocab()
    differ = [text for text, token in ours.items() if theirs.get(text) != token]
    if 2 * len(differ) <= len(ours):
        return []
    text = min(differ, key=lambda name: (name not in theirs, ours[name]))
    token = f"{text!r} is token {ours[text]:,} there, and {theirs.get(text, 'none')} in the data's"
    raise ValueError(
        f"data.tokenizer ({data.tokenizer_name}) is another model's: {len(differ):,} of {len(ours):,} tokens of "
        f"{network.name} differ ({token}); set data.tokenizer: {network.name}"
    )


def check_module(module: Any) -> None:
    """`check_data` of a module in its Trainer; what is unusual goes to the log."""
    for line in check_data(module, module.trainer.datamodule):
        rank_zero_info(line)
