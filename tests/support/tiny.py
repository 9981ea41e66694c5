"""Tiny models of four architectures with a byte tokenizer, made in memory and written to a folder."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from lit_align.models.scratch import bpe_tokenizer

ARCHITECTURES = ("llama", "gpt2", "qwen3", "gpt_neox")
# The bytes and the special tokens: no merges.
VOCABULARY = 256 + 7


def tiny_config(architecture: str, **changes: Any) -> PreTrainedConfig:
    """Two layers, width 32; weights wide enough that logits differ from token to token."""
    common = {
        "vocab_size": VOCABULARY,
        "initializer_range": 0.3,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if architecture == "gpt2":
        shape = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512}
    else:
        shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
        shape["max_position_embeddings"] = 512
    if architecture == "qwen3":
        shape |= {"num_key_value_heads": 2, "head_dim": 8}
    return AutoConfig.for_model(architecture, **{**common, **shape, **changes})


def tiny_folder(folder: Path, architecture: str = "llama", seed: int = 0, **changes: Any) -> str:
    """Write random weights, configuration and tokenizer; returns the folder's name."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(architecture, **changes), dtype=torch.float64)
    model.save_pretrained(folder)
    bpe_tokenizer([], VOCABULARY).save_pretrained(folder)
    return str(folder)


@contextlib.contextmanager
def norms_in_float64() -> Iterator[None]:
    """Root-mean-square norms that keep float64.

    transformers rounds their input to fp32, whatever the model is in: two ways of computing one thing that differ by
    1e-16 before a norm may differ by 1e-7 after it, and that noise would hide what an invariance test looks for.
    """

    def forward(self: Any, hidden: Tensor) -> Tensor:
        return self.weight * hidden * (hidden.square().mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()

    with patch.object(LlamaRMSNorm, "forward", forward), patch.object(Qwen3RMSNorm, "forward", forward):
        yield
