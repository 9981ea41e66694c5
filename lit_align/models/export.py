"""Write a model as a Hugging Face folder that plain transformers, TRL and vLLM load."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_info
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_align.models.adapters import adapter_file, save_adapter
from lit_align.models.load import _quiet
from lit_align.models.lora import has_lora
from lit_align.models.merge import merged_model, merged_state_dict
from lit_align.models.seal import SEAL, write_seal
from lit_align.models.sharding import is_sharded
from lit_align.utils.disk import sync, sync_tree
from lit_align.utils.owned import check_replaceable, free_beside, not_exported


def export(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: str | Path,
    stop_ids: Sequence[int] = (),
    adapter: bool = False,
    card: str | None = None,
    told: Mapping[str, Any] | None = None,
) -> Path:
    """Save weights (adapters merged), configuration, generation configuration, tokenizer and chat template.

    The folder appears whole or not at all: it is written beside its place and moved there. What killed attempts have
    left beside it goes. All processes of a model in slices must come here; the first writes.

    Args:
        model: a transformers model, as `LanguageModel.hf` or `ScalarModel.hf`.
        tokenizer: saved beside it, if given.
        folder: where to; an earlier export there is replaced, and nothing else is. Where others put files into it, it
            is kept beside, as NAME.replaced-1.
        stop_ids: tokens that end an answer, beside those that the model and the tokenizer name.
        adapter: save the adapter alone, in peft's format, in place of weights and configuration.
        card: the README.md of the folder.
        told: what else `lit_align.json` of the folder says, beside the checksums of its files.

    Raises:
        OSError: the folder cannot be written, the disk being full for one, or holds files that no export wrote; what
            is there is left as it was.
    """
    folder, sliced = Path(folder), is_sharded(model)
    check_replaceable(folder)
    # Of slices, every process gives its own; the first writes.
    file = adapter_file(model) if adapter else None
    state = merged_state_dict(model) if not adapter and (sliced or has_lora(model)) else None
    if sliced and torch.distributed.get_rank():
        return folder
    for left in [*folder.parent.glob(f".{folder.name}.partial-*"), *folder.parent.glob(f".{folder.name}.old-*")]:
        shutil.rmtree(left, ignore_errors=True)
    partial = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    try:
        if model.can_generate():
            _mend_generation_config(model, tokenizer, stop_ids)
        with _quiet():
            if adapter:
                save_adapter(model, partial, file)
            else:
                _save_whole(model, state, partial)
            if tokenizer is not None:
                tokenizer.save_pretrained(partial)
        if card is not None:
            (partial / "README.md").write_text(card)
        write_seal(partial, told)
        _like_others(partial)
        sync_tree(partial)  # a name must not outlive, in a power cut, what it names
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if not isinstance(error, (OSError, SafetensorError)):
            raise
        number = getattr(error, "errno", None) or errno.EIO
        reason = " ".join(str(getattr(error, "strerror", None) or error).split())
        raise OSError(number, f"{reason}: the model was not exported", str(folder)) from error
    _replace(partial, folder)
    return folder


def _save_whole(model: PreTrainedModel, state: dict[str, Tensor] | None, folder: Path) -> None:
    """Save a model, or, given the state with its adapters folded in, a plain one of its kind."""
    if state is None:
        model.save_pretrained(folder)
        return
    merged_model(model, state).save_pretrained(folder)


def _replace(partial: Path, folder: Path) -> None:
    """Move a finished folder to its place; the earlier export goes last, and stays if others put files into it."""
    check_replaceable(folder)  # once more: training took its time
    old = folder.with_name(f".{folder.name}.old-{os.getpid()}")
    kept = not_exported(folder)
    if kept:
        old = free_beside(folder)
        rank_zero_info(f"{folder} holds {kept[0]}, which no export wrote: the earlier export is kept in {old}")
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    with contextlib.suppress(OSError):  # not every file system can
        sync(folder.parent)
    if not kept:
        shutil.rmtree(old, ignore_errors=True)


def _like_others(folder: Path) -> None:
    """Give all files the permissions of any new file: safetensors writes its own for the owner alone."""
    mode = (folder / SEAL).stat().st_mode & 0o777
    for file in folder.rglob("*"):
        if file.is_file():
            file.chmod(mode)


def _mend_generation_config(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, stop_ids: Sequence[int]
) -> None:
    """Stop tokens of the data, the tokenizer and the configuration together, and the padding token not among them.

    A padding token in the list of stop tokens makes a saved model answer nothing (transformers issue 48016).
    """
    generation = model.generation_config
    if generation is None or tokenizer is None:
        return
    stops = generation.eos_token_id
    stops = [] if stops is None else stops if isinstance(stops, list) else [stops]
    stops = sorted({*stops, *stop_ids, tokenizer.eos_token_id} - {None})
    pad = tokenizer.pad_token_id
    generation.eos_token_id = [stop for stop in stops if stop != pad or stop == tokenizer.eos_token_id] or None
    generation.pad_token_id = pad if pad is not None else tokenizer.eos_token_id
