"""Whether a model's folder is whole: files that can be read, weights that fit config.json, and values that are numbers.

Each check raises a ValueError of one line, which names the file and the way out.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lit_align.utils import limits

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
AGAIN = "copy the folder again from where it comes from, or export it again"
# The largest header that the format allows, in bytes.
_LARGEST_HEADER = 100_000_000
# A matrix of the configuration's sizes may have this many times the numbers that the files hold: weights in 4 bits are
# packed, and some architectures factorise their embedding.
SPARE = 64

# Unexpected weights that change nothing, by kind: buffers that older versions saved and that are computed now.
_BUFFERS = re.compile(
    r"(^|\.)(inv_freq|(cos|sin)_cached|position_ids|num_batches_tracked|causal_mask|masked_bias|h\.\d+\.attn\.bias|attention\.bias)$"
)
_VOCABULARY_HEAD = re.compile(r"^(lm_head|embed_out|output_embeddings)\.")
# Matrices that write into the residual stream. Block expansion (LLaMA-Pro) inserts layers whose outputs start at zero.
_OUTPUTS = re.compile(r"\.(o_proj|out_proj|c_proj|wo|dense|down_proj|fc2|fc_out|w2|dense_4h_to_h|linear2)\.weight$")
# A head that classifies: what a reward model has, and a language model has no place for.
_SCALAR_HEAD = re.compile(r"^(score|classifier|classification_head)\.")


def read_json(file: Path) -> dict[str, Any]:
    """What a JSON file of a model's folder holds.

    Raises:
        ValueError: it is not JSON, or no mapping.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON ({error}): {AGAIN}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds {type(content).__name__}, expected a mapping: {AGAIN}")
    return content


def read_header(file: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors of a safetensors file, by name; only its header is read.

    Raises:
        ValueError: the file is empty, cut, or its header cannot be read.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or not 2 <= length <= min(size - 8, _LARGEST_HEADER):
            claims = "it is empty" if size == 0 else f"its header claims {length:,} bytes of a file of {size:,}"
            raise ValueError(f"{file} is damaged: {claims}; {AGAIN}")
        try:
            header: dict[str, Any] = json.loads(stream.read(length))
            ends = [told["data_offsets"][1] for name, told in header.items() if name != "__metadata__"]
            shapes = {name: tuple(told["shape"]) for name, told in header.items() if name != "__metadata__"}
            needed = 8 + length + max(ends, default=0)
        except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
            raise ValueError(f"{file} is damaged: its header cannot be read ({error}); {AGAIN}") from error
    if size != needed:
        raise ValueError(f"{file} is damaged: it has {size:,} bytes, and its header asks for {needed:,}; {AGAIN}")
    return shapes


def check_files(folder: Path, weights: bool = True) -> None:
    """Check the files of a model's folder before anything is loaded; no weights are read.

    Args:
        folder: a name on the hub, which is no folder, is not checked.
        weights: whether weights are taken from it.

    Raises:
        ValueError: config.json, the index or a weight file is damaged, or the index names a file that is gone.
    """
    limits.check_folder(folder)
    if not (folder / CONFIG).exists():
        return
    config = read_json(folder / CONFIG)
    if not weights:
        return
    if (folder / WEIGHTS).exists():
        _check_size(folder, config, _numbers(read_header(folder / WEIGHTS)))
    elif (folder / INDEX).exists():
        _check_size(folder, config, _check_shards(folder))


def _numbers(shapes: Mapping[str, tuple[int, ...]]) -> int:
    return sum(math.prod(shape) for shape in shapes.values())


def _check_size(folder: Path, config: Mapping[str, Any], numbers: int) -> None:
    """Refuse sizes that are far beyond the weights, before a model of these sizes takes all memory."""
    text = config.get("text_config")
    sizes = {**config, **text} if isinstance(text, dict) else dict(config)
    hidden, vocabulary = (sizes.get(name) for name in ("hidden_size", "vocab_size"))
    for name, value in (("hidden_size", hidden), ("vocab_size", vocabulary)):
        if type(value) is int and type(hidden) is int and value * min(hidden, value) > SPARE * max(numbers, 1):
            raise ValueError(
                f"{folder / CONFIG}: {name}: {value:,} does not fit the weights, of {numbers:,} numbers: {AGAIN}"
            )


def _check_shards(folder: Path) -> int:
    """Check the files of an index; return how many numbers they hold."""
    numbers = 0
    index = folder / INDEX
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise ValueError(f"{index} has no weight_map from weights to files: {AGAIN}")
    for shard in sorted(set(places.values())):
        if not (folder / shard).exists():
            raise ValueError(f"{index} names {shard}, which is not in the folder: {AGAIN}")
        there = read_header(folder / shard)
        numbers += _numbers(there)
        if lost := sorted(name for name, place in places.items() if place == shard and name not in there):
            raise ValueError(
                f"{folder / shard} lacks {len(lost)} of the weights that {index.name} places there, the first being "
                f"{lost[0]}: {AGAIN}"
            )
    return numbers


def check_fit(name: str, model: nn.Module, info: Mapping[str, Any], scalar: bool) -> list[str]:
    """Check that weights and config.json belong together.

    Args:
        name: of the model, for the error.
        model: as loaded.
        info: transformers' `output_loading_info`.
        scalar: whether a sequence classifier with one label was loaded; its head may be new.

    Returns:
        Names of missing weights, of which only a scalar head may be.

    Raises:
        ValueError: weights of other shapes, without a place, or missing.
    """
    _check_shapes(name, model, info.get("mismatched_keys") or ())
    missing = sorted(info["missing_keys"])
    kind = type(model).__name__
    extra = sorted(key for key in info.get("unexpected_keys") or () if not _harmless(key, model, scalar))
    lacking = [key for key in missing if not (scalar and key.startswith("score"))]
    if not scalar and (heads := [key for key in extra if _SCALAR_HEAD.match(key)]):
        raise ValueError(
            f"{name!r} holds a classifier or a reward model ({heads[0]}), and a language model is wanted: give the "
            "folder of a language model"
        )
    if lacking:
        raise ValueError(
            f"{name!r} lacks {len(lacking)} of the weights of {kind}, the first being {lacking[0]}: they would be "
            f"random; config.json{_layers(model)} and the weight files do not belong together: {AGAIN}"
        )
    if extra:
        raise ValueError(
            f"{name!r} holds {len(extra)} weights without a place in {kind}, the first being {extra[0]}: they would "
            f"be cut off; config.json{_layers(model)} and the weight files do not belong together: {AGAIN}"
        )
    return missing


def _check_shapes(name: str, model: nn.Module, mismatched: Iterable[tuple[str, Any, Any]]) -> None:
    config = getattr(model, "config", None)
    told = config.to_dict() if config is not None else {}
    found = []
    for key, in_file, by_config in mismatched:
        in_file, by_config = tuple(in_file), tuple(by_config)
        if _SCALAR_HEAD.match(key) and by_config[:1] == (1,):
            raise ValueError(
                f"{name!r} is a classifier with {in_file[0]} labels ({key}), and a reward or value model has one: give "
                "the folder of a reward model, as RewardModule exports it, or of a language model"
            )
        wanted = [by for held, by in zip(in_file, by_config, strict=False) if held != by]
        options = [f"{option}: {value}" for option, value in told.items() if type(value) is int and value in wanted]
        found.append((not options, key, in_file, by_config, f" ({', '.join(options)})" if options else ""))
    if found:  # one that an option explains, if there is one
        _, key, in_file, by_config, by = min(found)
        raise ValueError(
            f"{name!r}: config.json{by} does not fit the weights: {key} has shape {_shape(in_file)} in the file, and "
            f"{_shape(by_config)} by config.json: put back the config.json of these weights, or {AGAIN}"
        )


def _shape(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def _layers(model: nn.Module) -> str:
    layers = getattr(getattr(model, "config", None), "num_hidden_layers", None)
    return f" (num_hidden_layers: {layers})" if isinstance(layers, int) else ""


def _harmless(key: str, model: nn.Module, scalar: bool) -> bool:
    """Whether a weight without a place changes nothing."""
    tied = bool(getattr(getattr(model, "config", None), "tie_word_embeddings", False))
    return bool(_BUFFERS.search(key)) or ((scalar or tied) and bool(_VOCABULARY_HEAD.match(key)))


def check_values(name: str, weights: Mapping[str, Tensor]) -> None:
    """Check that weights are finite, and that no matrix is zero throughout.

    Three kinds of zeros are accepted: a matrix that is zero in every layer (a projection that starts from zero), a
    vocabulary head, and a layer whose output projections, all of them and nothing else, are zero (block expansion).
    Any other matrix of zeros is damage.

    Args:
        name: of the model or file, for the error.
        weights: by name; of half precision too.

    Raises:
        ValueError: names the first weight that is wrong.
    """
    zero: dict[str, bool] = {}
    for key, weight in weights.items():
        if not weight.is_floating_point() or weight.numel() == 0 or weight.is_meta:
            continue
        # A sum is not finite where a number is not; it may overflow where all are.
        if not torch.isfinite(weight.sum(dtype=torch.float64)) and not bool(torch.isfinite(weight).all()):
            count = int((~torch.isfinite(weight)).sum())
            dtype = str(weight.dtype).removeprefix("torch.")
            raise ValueError(
                f"{name}: some weights are not finite: {count:,} of {weight.numel():,} in {key} ({dtype}); the "
                f"training that wrote it diverged, or the file is damaged: {AGAIN}"
            )
        if weight.dim() >= 2:
            zero[key] = not bool(weight.any())
    for key in (key for key, nothing in zero.items() if nothing and not _VOCABULARY_HEAD.match(key)):
        peers = [other for other in zero if _kind(other) == _kind(key)]
        if (len(peers) == 1 or not all(zero[peer] for peer in peers)) and not _passes_through(key, zero):
            raise ValueError(f"{name}: {key} holds only zeros: the file is damaged; {AGAIN}")


def _passes_through(key: str, zero: Mapping[str, bool]) -> bool:
    """True if the zeros of a layer are all of its output projections, so that the layer adds nothing."""
    layer = re.match(r".*?\.\d+\.", key)
    if layer is None:
        return False
    inside = {other: nothing for other, nothing in zero.items() if other.startswith(layer[0])}
    return all(nothing == bool(_OUTPUTS.search(other)) for other, nothing in inside.items())


def _kind(key: str) -> str:
    return re.sub(r"\d+", "N", key)
