"""Compare a model in memory with the folder that was exported from it, as transformers and peft load it."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from lit_align.accelerate.tree_attention import NAME
from lit_align.models.adapters import CONFIG, WEIGHTS
from lit_align.models.export import export
from lit_align.models.load import _quiet, choose_experts
from lit_align.models.lora import peft_warnings_off, without_dropout


def check_export(
    model: PreTrainedModel,
    adapter: bool = False,
    parent: str | Path | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> float:
    """Export a model to a folder that is removed again, reload it, and compare one forward.

    Args:
        model: a transformers model, as `LanguageModel.hf` or `ScalarModel.hf`, with or without adapters.
        adapter: export the adapter alone.
        parent: where to make the folder, which is as large as the model; None for the system's temporary folder.
        revision: revision of an adapter's base model on the hub.
        trust_remote_code: whether the model's own code may run.

    Returns:
        The largest difference between the two outputs.

    Raises:
        ValueError: the folder does not load, or what it holds is not the model in memory.
    """
    with tempfile.TemporaryDirectory(dir=parent) as place:
        folder = export(model, None, Path(place, "model"), adapter=adapter)
        return check_reload(model, folder, revision, trust_remote_code)


def check_reload(
    model: PreTrainedModel, folder: str | Path, revision: str | None = None, trust_remote_code: bool = False
) -> float:
    """Compare one forward of a model in memory with that of an exported folder, merged or adapter.

    Args:
        model: the model in memory.
        folder: the exported folder.
        revision: revision of an adapter's base model on the hub.
        trust_remote_code: whether the model's own code may run.

    Returns:
        The largest difference between the two outputs.

    Raises:
        ValueError: the folder does not load in transformers or peft, or its outputs are others.
    """
    try:
        plain = reloaded(model, Path(folder), revision, trust_remote_code)
    except (OSError, ValueError, TypeError, RuntimeError, KeyError, ImportError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{folder} does not load in plain transformers: {reason}") from error
    expected, got = _outputs(model), _outputs(plain)
    if got.shape != expected.shape:
        raise ValueError(f"{folder} is another model: outputs {tuple(got.shape)}, in the run {tuple(expected.shape)}")
    difference = float((got - expected).abs().max())
    # Two matrix products in place of one; in half precision each rounds to three digits.
    tolerance = 0.1 if model.dtype in (torch.bfloat16, torch.float16) else 1e-4
    if not difference <= tolerance * max(float(expected.abs().max()), 1.0):
        raise ValueError(
            f"{folder} is not the model of the run: outputs differ by {difference:.2g} of {expected.abs().max():.2g}"
        )
    return difference


def reloaded(model: PreTrainedModel, folder: Path, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """Load the folder as a plain transformers or peft model, on the device and in the precision of `model`."""
    causal = model.can_generate()
    auto: Any = AutoModelForCausalLM if causal else AutoModelForSequenceClassification
    attention = model.config._attn_implementation
    options: dict[str, Any] = {"dtype": model.dtype, "use_safetensors": True, "trust_remote_code": trust_remote_code}
    options["attn_implementation"] = "sdpa" if attention == NAME else attention
    with _quiet(), peft_warnings_off():
        if not (folder / CONFIG).exists():
            plain = auto.from_pretrained(folder, **options)
            choose_experts(plain)
            return plain.to(model.device)
        base = json.loads((folder / CONFIG).read_text())["base_model_name_or_path"]
        plain = auto.from_pretrained(base, revision=revision, **options, **({} if causal else {"num_labels": 1}))
        choose_experts(plain)
        rows = model.config.get_text_config().vocab_size
        if rows != plain.config.get_text_config().vocab_size:
            plain.resize_token_embeddings(rows, mean_resizing=False)
        if not (folder / WEIGHTS).exists():  # peft would look for a pickle
            raise ValueError(f"{folder} has no {WEIGHTS}")
        return PeftModel.from_pretrained(plain, str(folder)).to(model.device)


@torch.no_grad()
def _outputs(model: Any) -> Tensor:
    """Logits of every token of a few ids, the last of the vocabulary among them; or the score of the sequence."""
    vocabulary = int(model.config.get_text_config().vocab_size)
    ids = torch.tensor([[*((37 * i + 11) % vocabulary for i in range(7)), vocabulary - 1]], device=model.device)
    with without_dropout(model):
        logits: Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    return logits.double()
