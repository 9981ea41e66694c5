"""What is asked of vLLM and what is made of its answers, by a stand-in: vLLM itself needs a GPU."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import sys
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.tiny import tiny_folder
from torch import Tensor

from lit_align.models import LanguageModel, Lora, Network, load_causal_lm
from lit_align.rollout import Sampling, VLLMEngine, vllm_engine
from lit_align.rollout.vllm_engine import check_weights
from lit_align.types import Completion

PROMPTS = [torch.tensor([1, 40, 41]), torch.tensor([1, 50])]


class StandIn:
    """Remembers what it was asked, answers [prompt length, 2] and is cut at max_tokens."""

    def __init__(self, **options: Any) -> None:
        self.options, self.did, self.weights = options, [], {}
        torch.manual_seed(0)  # as vLLM does to the process that it is in

    def collective_rpc(self, method: str, kwargs: dict[str, Any]) -> None:
        self.did.append(method)
        self.weights: dict[str, Tensor] = {name: weight.clone() for name, weight in kwargs["weights_iterator"]}

    def wake_up(self, tags: list[str]) -> None:
        self.did.append(f"wake {tags[0]}")

    def sleep(self, level: int) -> None:
        self.did.append(f"sleep {level}")

    def reset_prefix_cache(self) -> None:
        self.did.append("reset")

    def generate(self, prompts: list[dict], parameters: list[Any], use_tqdm: bool) -> list[Any]:
        self.did.append("generate")
        self.parameters = parameters
        outputs = []
        for prompt, asked in zip(prompts, parameters, strict=True):
            tokens = [len(prompt["prompt_token_ids"]), 2][: asked.max_tokens]
            logprobs = [{token: SimpleNamespace(logprob=-float(token))} for token in tokens]
            answer = SimpleNamespace(
                token_ids=tuple(tokens),
                logprobs=None if asked.logprobs is None else logprobs,
                finish_reason="stop" if tokens[-1] in asked.stop_token_ids else "length",
            )
            outputs.append(SimpleNamespace(outputs=[answer] * asked.n))
        return outputs


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> VLLMEngine:
    vllm: Any = ModuleType("vllm")
    vllm.LLM, vllm.SamplingParams = StandIn, SimpleNamespace
    vllm.__spec__ = importlib.machinery.ModuleSpec("vllm", None)
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    monkeypatch.setattr(vllm_engine, "check_place", lambda device: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    return VLLMEngine(options={"max_num_seqs": 64})


def policy(tmp_path: Path, lora: Lora | None = None, **changes: Any) -> LanguageModel:
    return LanguageModel(load_causal_lm(Network(tiny_folder(tmp_path / "model", **changes), lora=lora)))


def test_answers_are_those_of_each_prompt(engine: VLLMEngine, tmp_path: Path) -> None:
    model = policy(tmp_path)
    asked = Sampling(5, temperature=0.7, top_p=0.9, samples=3)
    first, second = engine(model, PROMPTS, asked, [2, 7], seed=1)
    assert first == [Completion([3, 2], True, [-3.0, -2.0])] * 3
    assert second == [Completion([2, 2], True, [-2.0, -2.0])] * 3
    one, other = engine._llm.parameters
    assert (one.n, one.max_tokens, one.temperature, one.top_p, one.logprobs) == (3, 5, 0.7, 0.9, 0)
    # Our stop tokens and no others, and nobody needs the text.
    assert one.stop_token_ids == [2, 7]
    assert one.ignore_eos
    assert not one.detokenize
    # The k-th answer to a prompt is drawn with seed + k.
    assert abs(one.seed - other.seed) > 3
    engine(model, PROMPTS, asked, [2, 7], seed=1)
    assert [p.seed for p in engine._llm.parameters] == [one.seed, other.seed]
    engine(model, PROMPTS, asked, [2, 7], seed=2)
    assert engine._llm.parameters[0].seed != one.seed


def test_cut_and_greedy_answers(engine: VLLMEngine, tmp_path: Path) -> None:
    assert engine(policy(tmp_path), PROMPTS, Sampling(1, temperature=0.0), [2], seed=0) == [
        [Completion([3], False)],
        [Completion([2], True)],
    ]


@pytest.mark.parametrize("sleep", [True, False])
def test_every_rollout_takes_over_the_weights(engine: VLLMEngine, sleep: bool, tmp_path: Path) -> None:
    engine.sleep = sleep
    model = policy(tmp_path, tie_word_embeddings=True)
    state = torch.get_rng_state()
    engine(model, PROMPTS, Sampling(4), [2], seed=0)
    assert torch.equal(torch.get_rng_state(), state)
    llm, asleep = engine._llm, ["sleep 2"] if sleep else []
    assert llm.did == ["reload_weights", "reset", "generate", *asleep]
    assert llm.options["model"] == str(tmp_path / "model")
    assert llm.options["logprobs_mode"] == "processed_logprobs"
    assert llm.options["max_num_seqs"] == 64
    assert os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    # As in a checkpoint: one name for what is tied.
    assert set(llm.weights) == set(load_file(tmp_path / "model" / "model.safetensors"))
    with torch.no_grad():
        model.hf.model.norm.weight.add_(1.0)
    llm.did.clear()
    engine(model, PROMPTS, Sampling(4), [2], seed=0)
    assert engine._llm is llm
    woken = (["wake weights"], ["wake kv_cache"]) if sleep else ([], [])
    assert llm.did == [*woken[0], "reload_weights", *woken[1], "reset", "generate", *asleep]
    assert torch.equal(llm.weights["model.norm.weight"], model.hf.model.norm.weight)


def test_adapters_are_merged(engine: VLLMEngine, tmp_path: Path) -> None:
    model = policy(tmp_path, Lora(r=2))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
    engine(model, PROMPTS, Sampling(4), [2], seed=0)
    plain = load_file(tmp_path / "model" / "model.safetensors")
    assert set(engine._llm.weights) == set(plain)
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.allclose(engine._llm.weights[name], plain[name].float())


# Kills: a vLLM that samples with one of two weights that adapters have parted.
def test_weights_without_a_place_in_vllm_are_refused(tmp_path: Path) -> None:
    for lora, tied, parts in (
        (Lora(r=2, targets=["lm_head"]), True, True),
        (Lora(r=2, targets=["embed_tokens"]), True, True),
        (Lora(r=2, targets=["embed_tokens", "lm_head"]), False, False),
        (Lora(r=2, modules_to_save=["lm_head"]), True, False),
        (Lora(r=2), True, False),
    ):
        model = policy(tmp_path, lora, tie_word_embeddings=tied)
        with pytest.raises(ValueError, match=r"tied to another weight, and lora.targets") if parts else nullcontext():
            check_weights(model)
    grown = LanguageModel(load_causal_lm(Network(tiny_folder(tmp_path / "grown"), new_tokens=["<|im_start|>"])))
    with pytest.raises(ValueError, match=r"no rows for network.new_tokens: run SFT with them first"):
        check_weights(grown)


def test_other_places_are_refused() -> None:
    with pytest.raises(ValueError, match="CUDA_VISIBLE_DEVICES"):
        vllm_engine.check_place(torch.device("cpu"))
    with pytest.raises(ValueError, match="CUDA_VISIBLE_DEVICES"):
        vllm_engine.check_place(torch.device("cuda", 1))
    vllm_engine.check_place(torch.device("cuda", 0))


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
def test_without_vllm_the_error_says_what_to_install() -> None:
    with pytest.raises(ValueError, match=r"pip install 'lit_align\[vllm\]'"):
        VLLMEngine()
