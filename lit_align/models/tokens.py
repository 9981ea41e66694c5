"""New tokens: rows of the embeddings for special tokens that a tokenizer lacks.

Source: Hewitt 2021, "Initializing New Word Embeddings for Pretrained Language Models": the mean of all rows, so that no
probability of a known token changes much.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase


def add_tokens(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]) -> list[int]:
    """Add special tokens to a tokenizer.

    Args:
        tokenizer: changed in place.
        tokens: those that it has as single tokens stay as they are.

    Returns:
        The ids of those that were new.
    """
    known = set(tokenizer.get_vocab())
    new = [token for token in dict.fromkeys(tokens) if token not in known]
    if new:
        tokenizer.add_tokens(new, special_tokens=True)
    return [tokenizer.get_vocab()[token] for token in new]


def check_new_tokens(
    tokens: Sequence[str], tokenizer: PreTrainedTokenizerBase, data: PreTrainedTokenizerBase | None
) -> None:
    """Refuse a tokenizer of the data that gives a new token another id than the model's.

    Raises:
        ValueError: names the token and its ids.
    """
    for token in tokens if data is not None else ():
        ids = [known.get_vocab().get(token) for known in (tokenizer, data) if known is not None]
        if len(set(ids)) > 1:
            raise ValueError(
                f"network.new_tokens: {token!r} is {ids[0]} in the model's vocabulary and {ids[1]} in that of "
                "data.tokenizer: name the model of network.name there"
            )


@torch.no_grad()
def grow(model: Any, ids: Sequence[int], rows: int | None = None) -> None:
    """Give a model rows for new tokens, each the mean of the rows before them.

    Args:
        model: with input embeddings and, if it is a language model, a head.
        ids: of the new tokens, the last of the vocabulary.
        rows: of the embeddings afterwards; None for as many as the ids need.
    """
    if not ids:
        return
    before = len(model.get_input_embeddings().weight)
    rows = max(rows or 0, max(ids) + 1, before)
    if rows != before:
        model.resize_token_embeddings(rows, mean_resizing=False)
    # Adapters written beside these rows do not fit the base model's folder.
    model.grown = len(ids)
    known, new = min(ids), torch.tensor(sorted(ids))
    for module in {model.get_input_embeddings(), model.get_output_embeddings()} - {None}:
        for parameter in (module.weight, getattr(module, "bias", None)):
            if isinstance(parameter, nn.Parameter) and len(parameter) == rows:
                parameter[new] = parameter[:known].mean(0)


def embedding_names(model: PreTrainedModel) -> list[str]:
    """Paths of the input embeddings and of the head, if there is one."""
    ends = [module for module in (model.get_input_embeddings(), model.get_output_embeddings()) if module is not None]
    return [path for path, module in model.named_modules() if any(module is end for end in ends)]
