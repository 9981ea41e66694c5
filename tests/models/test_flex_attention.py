"""FlexAttention scores packed rows as its mask does. On a CPU it has no gradient, and is run without its compiler."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers.integrations.flex_attention
import transformers.masking_utils
from support.tiny import tiny_config
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from transformers import AutoModelForCausalLM

from lit_align.functional.packing import pack
from lit_align.models import LanguageModel
from lit_align.types import Example, Segment


# Kills: branches that see each other; a window counted along the row; a mask of another kind of layer.
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("llama", {}),
        ("qwen3", {}),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
        ("gpt_neox", {}),
    ],
)
def test_the_same_as_by_the_mask(architecture: str, changes: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        transformers.integrations.flex_attention,
        "compile_friendly_flex_attention",
        lambda query, key, value, training=False, **kwargs: flex_attention(query, key, value, **kwargs),
    )

    def made_as_it_is(*args: Any, _compile: bool, **kwargs: Any) -> BlockMask:
        return create_block_mask(*args, **kwargs)

    monkeypatch.setattr(transformers.masking_utils, "create_block_mask", made_as_it_is)  # of plain rows, in the probe
    examples = [
        Example(
            Segment(list(range(9, 9 + n)), [False] * n), [Segment([20 + n, 30, 40 + k], [True] * 3) for k in (1, 2)]
        )
        for n in (6, 9, 4)
    ]
    scores = []
    for attention in ("sdpa", "flex_attention"):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(tiny_config(architecture, **changes), attn_implementation=attention)
        with torch.no_grad():
            language = LanguageModel(model.eval())
            assert language.packs
            scores.append(language(pack(examples, row_tokens=30)).logps_S)
    assert (scores[0] - scores[1]).abs().max() < 1e-4
