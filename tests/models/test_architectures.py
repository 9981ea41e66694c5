"""Every causal language model of transformers: right as a full forward has it, or refused, never silently wrong."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import transformers
from support.architectures import ARCHITECTURES, _greedy, _logps, build, examine
from support.tiny import tiny_config
from transformers import AutoModelForCausalLM, Phi3Config, Phi3ForCausalLM

from lit_align.functional.packing import pack
from lit_align.models.language import LanguageModel
from lit_align.models.sharding import shard
from lit_align.rollout import Sampling
from lit_align.rollout.decoding import Decoding, decoding_of
from lit_align.rollout.transformers_engine import TransformersEngine
from lit_align.types import Example, Segment
from lit_align.utils import versions

PAGE = Path(__file__).parents[2] / "docs" / "architectures.md"
# One of each kind: attention, learned positions, ALiBi, windows, experts, recurrent, hybrid, a factor behind the head.
KINDS = {
    "llama": "trees; completions: cached",
    "gpt2": "trees; completions: cached",
    "mpt": "one sequence a row; completions: cached",
    "gemma3_text": "trees; completions: cached",
    "gemma4_text": "trees",
    "mixtral": "trees; completions: cached",
    "mamba": "stopped rows stay",
    "qwen3_5_text": "stopped rows stay",
    "falcon_h1": "stopped rows stay",
    "bart": "recomputed",
    "moshi": "one sequence a row",
    "llama4_text": "one sequence a row",
}


# Kills: `past_key_values` for a model that calls it otherwise; a cache told to drop rows that it cannot; one norm that
# stands for all of its class (Gemma 4); Falcon-H1's factor left out; MPT's factor of null; a window that is not there.
@pytest.mark.parametrize("name", KINDS)
def test_kinds_of_architecture(name: str) -> None:
    outcome = examine(name)
    assert outcome.kind == "right", outcome
    assert KINDS[name] in outcome.how


# Kills: log-probabilities of a model that sees later tokens.
def test_a_model_that_is_not_causal_is_refused() -> None:
    config = build("bert-generation").config
    config.is_decoder = False
    model = AutoModelForCausalLM.from_config(config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match="attends to later tokens"):
            LanguageModel(model)


# Kills: a probe of one token, whose embedding is zero where it is the padding.
def test_a_factor_behind_the_head_is_seen() -> None:
    model = AutoModelForCausalLM.from_config(tiny_config("llama"))
    model.model.embed_tokens.weight.data[0] = 0
    forward = type(model).forward

    def scaled(*args: Any, **options: Any) -> Any:
        output = forward(model, *args, **options)
        output.logits = output.logits * 0.5
        return output

    model.forward = scaled
    with pytest.raises(ValueError, match="computes its logits in a way that is not known"):
        LanguageModel(model)


def phi3_with_longrope() -> LanguageModel:
    torch.manual_seed(0)
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "factor": 8.0, "partial_rotary_factor": 1.0}
    rope |= {"short_factor": [1.0] * 4, "long_factor": [1.0, 1.5, 2.0, 4.0], "original_max_position_embeddings": 12}
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = Phi3Config(
        **shape, vocab_size=101, max_position_embeddings=96, initializer_range=0.3, pad_token_id=0, rope_parameters=rope
    )
    return LanguageModel(Phi3ForCausalLM(config).eval()).eval()


def tokens(count: int, start: int) -> list[int]:
    return [3 + (11 * i + 5 * start) % 90 for i in range(count)]


# Kills: a short sequence turned by the frequencies of a long one beside it (0.5 nats), in rows and in completions.
@torch.no_grad()
def test_frequencies_are_those_of_a_sequence_alone() -> None:
    policy = phi3_with_longrope()
    assert policy.packs
    answers = [Segment(tokens(n, k), [True] * n) for k, n in ((1, 4), (2, 20))]
    other = [Segment(tokens(5, 1), [True] * 5)]
    trees = [Example(Segment(tokens(3, 0), [False] * 3), answers), Example(Segment(tokens(4, 3), [False] * 4), other)]
    alone = [_logps(policy.hf, tokens(3, 0) + tokens(n, k))[2:] for k, n in ((1, 4), (2, 20))]
    alone.append(_logps(policy.hf, tokens(4, 3) + tokens(5, 1))[3:])
    torch.testing.assert_close(policy(pack(trees, row_tokens=64)).logps_S, torch.cat(alone), rtol=0, atol=1e-5)
    prompts = [tokens(8, 0), tokens(5, 1)]  # of which the first crosses the switch
    engine = TransformersEngine()
    answered = engine(policy, [*map(torch.tensor, prompts)], Sampling(max_new_tokens=10, temperature=0.0), [2], 0)
    for prompt, (completion,) in zip(prompts, answered, strict=True):
        assert completion.tokens == _greedy(policy.hf, prompt, 10)


# Kills: NaN from padded rows in float64, blamed on the weights.
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_prompts_of_different_length_in_float64(attention: str) -> None:
    model = AutoModelForCausalLM.from_config(tiny_config("llama"), dtype=torch.float64, attn_implementation=attention)
    policy = LanguageModel(model.eval()).eval()
    prompts = [tokens(2, 0), tokens(7, 1)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        answered = TransformersEngine()(policy, [*map(torch.tensor, prompts)], Sampling(max_new_tokens=4), [2], 0)
    for prompt, (completion,) in zip(prompts, answered, strict=True):
        with torch.no_grad():
            scored = _logps(model, prompt + completion.tokens)[len(prompt) - 1 :]
        # transformers keeps fp32 in its norms.
        torch.testing.assert_close(torch.tensor(completion.logps, dtype=scored.dtype), scored, rtol=0, atol=1e-5)


def listed() -> dict[str, str]:
    return dict(re.findall(r"^\| `([\w-]+)` \| ([\w ]+) \|", PAGE.read_text(), re.MULTILINE))


def test_the_page_lists_every_architecture_of_the_tested_version() -> None:
    assert "wrong" not in listed().values()
    if transformers.__version__ == versions.tested()["transformers"]:
        assert sorted(listed()) == ARCHITECTURES


@pytest.mark.slow
def test_every_architecture_is_as_the_page_says() -> None:
    if transformers.__version__ != versions.tested()["transformers"]:
        pytest.skip(f"the page is of transformers {versions.tested()['transformers']}")
    assert {name: examine(name).kind for name in ARCHITECTURES} == listed()


# Kills: a probe that takes the rounding of autocast for a wrong cache or a wrong mask.
@pytest.mark.parametrize("seed", range(3))
def test_autocast_does_not_slow_a_model_down(seed: int) -> None:
    torch.manual_seed(seed)
    shape = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 8}
    model = AutoModelForCausalLM.from_config(tiny_config("llama", **{**shape, "initializer_range": 0.05}))
    with torch.autocast("cpu", torch.bfloat16):
        policy = LanguageModel(model.eval())
        assert policy.packs
        assert decoding_of(policy) is Decoding


# Kills: running out of memory in a probe, taken for a model that cannot.
def test_no_memory_in_a_probe_is_no_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = LanguageModel(AutoModelForCausalLM.from_config(tiny_config("llama")).eval())

    def full(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(policy.backbone, "forward", full)
    with pytest.raises(torch.OutOfMemoryError):
        decoding_of(policy)
    assert policy.decoding is None


# Kills: processes that run a model's blocks a different number of times, and wait for each other.
def test_what_computes_lengths_apart_is_not_sharded() -> None:
    with pytest.raises(ValueError, match=r"sequences of different length apart, which fsdp2 cannot do"):
        shard(phi3_with_longrope(), cast("Any", None))
