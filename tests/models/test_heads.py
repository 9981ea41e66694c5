"""Another's kernel is used where it can be, and where it cannot, that is said."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from lightning import Trainer
from support.tiny import VOCABULARY, norms_in_float64, tiny_config, tiny_folder
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from lit_align.functional.packing import pack
from lit_align.models import LanguageModel, Network, load_scorer
from lit_align.models.heads import obstacle
from lit_align.models.roles import ScalarAdapter
from lit_align.modules import PPOModule, SFTModule
from lit_align.rewards import FunctionReward
from lit_align.types import Example, PackedBatch, Segment


@pytest.fixture(autouse=True)
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """The logits of two tokens are held at most."""
    monkeypatch.setattr(LanguageModel, "dense_bytes", 8 * VOCABULARY)


needs_torch = pytest.mark.skipif(not hasattr(nn, "LinearCrossEntropyOptions"), reason="torch 2.13")


def batch() -> PackedBatch:
    return pack([Example(Segment([5, 6, 7, 8], [False, True, True, True])), Example(Segment([9, 4], [False, True]))])


def tiny(kind: str = "llama") -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(tiny_config(kind), dtype=torch.float64).eval()


def scores(language: LanguageModel, temperature: float) -> list[Tensor]:
    """Log-probabilities, and the gradients of a loss that weighs each differently."""
    language.hf.zero_grad()
    with norms_in_float64():
        logps_S = language(batch(), temperature).logps_S
        (logps_S * torch.arange(1.0, len(logps_S) + 1)).sum().backward()
    return [logps_S.detach(), *(p.grad.clone() for p in language.parameters() if p.grad is not None)]


# Kills: the own pass taken all the same; the temperature lost on the way.
@needs_torch
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_a_model_scores_the_same_by_torchs_head(
    temperature: float, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny()
    expected = scores(LanguageModel(model), temperature)
    monkeypatch.delattr("lit_align.models.language.linear_logprobs")
    with caplog.at_level("INFO"):
        got = scores(LanguageModel(model, "torch"), temperature)
    assert len(got) == len(expected) > 5
    assert all(torch.allclose(ours, theirs, rtol=0, atol=1e-12) for ours, theirs in zip(expected, got, strict=True))
    assert f"vocabulary head: torch, as 4 scored tokens x {VOCABULARY}" in caplog.text


# Kills: logits made twice that could be held.
def test_few_logits_are_held_whatever_was_asked_for(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LanguageModel, "dense_bytes", 16 * VOCABULARY)
    monkeypatch.setattr("lit_align.models.language.FUSED", {})
    model = LanguageModel(tiny())
    model.head = "torch"
    with caplog.at_level("INFO"):
        model(batch())
    assert "vocabulary head: dense, as 4 scored tokens" in caplog.text


@needs_torch
def test_what_torchs_head_does_not_do_falls_to_the_own_one_and_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny()
    own, language = LanguageModel(model), LanguageModel(model, "torch")
    with caplog.at_level("INFO"), norms_in_float64(), torch.no_grad():
        for _ in range(2):
            scored, expected = language(batch(), entropies=True), own(batch(), entropies=True)
            assert torch.equal(scored.logps_S, expected.logps_S)
            assert torch.equal(scored.entropies_S, expected.entropies_S)  # type: ignore[arg-type]
            assert torch.equal(language(batch(), top_p=0.7).logps_S, own(batch(), top_p=0.7).logps_S)
    assert caplog.text.count("vocabulary head: chunked, not torch, as entropies are asked for") == 1
    assert caplog.text.count("vocabulary head: chunked, not torch, as a nucleus is asked for") == 1
    assert caplog.text.count("vocabulary head: chunked, as ") == 1


@needs_torch
def test_a_head_that_is_more_than_a_product_is_no_ones_kernel(caplog: pytest.LogCaptureFixture) -> None:
    config = tiny_config("gemma2", sliding_window=4, head_dim=8, num_key_value_heads=2, final_logit_softcapping=5.0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval()
    with caplog.at_level("INFO"), torch.no_grad():
        got, expected = LanguageModel(model, "torch")(batch()).logps_S, LanguageModel(model)(batch()).logps_S
    assert torch.equal(got, expected)
    assert "not torch, as the head of Gemma2ForCausalLM is more than a product" in caplog.text


# Kills: log-probabilities of two digits.
@needs_torch
def test_half_precision_is_not_for_torchs_head() -> None:
    language = LanguageModel(tiny().float(), "torch")
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert language(batch()).logps_S.dtype == torch.float32
    assert "half precision" in str(language._said)


def test_what_keeps_ligers_kernel_from_being_used() -> None:
    states = torch.zeros(3, 4, dtype=torch.bfloat16, device="meta")
    assert obstacle("liger", states, 1.0, 1.0, False) is None
    assert (
        obstacle("liger", states, 0.7, 1.0, False) == "states in half precision would be rounded again by a temperature"
    )
    assert obstacle("liger", states.float(), 0.7, 1.0, False) is None
    assert obstacle("liger", states[:0], 1.0, 1.0, False) == "no tokens are scored"
    assert obstacle("liger", torch.zeros(3, 4), 1.0, 1.0, False) == "the model is on a CPU"


def test_a_run_on_a_cpu_refuses_ligers_kernel_before_it_loads_anything(tmp_path: Path) -> None:
    module = SFTModule(Network(str(tmp_path / "nowhere"), head="liger"))
    with pytest.raises(ValueError, match=r"a kernel of GPUs: leave it out, or set trainer\.accelerator: gpu"):
        Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, max_steps=1).fit(module, [])


def test_ppo_refuses_a_head_that_gives_no_entropies() -> None:
    with pytest.raises(ValueError, match=r"head torch does not give: unset network\.head"):
        PPOModule(Network("x", head="torch"), FunctionReward(lambda *_: []))


def test_a_head_that_is_not_there_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = tiny()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'lit_align\[liger\]'"):
        LanguageModel(model, "liger")
    monkeypatch.delattr(nn, "LinearCrossEntropyOptions", raising=False)
    with pytest.raises(ValueError, match=r"network\.head: torch needs torch 2\.13; this is 2\."):
        LanguageModel(model, "torch")
    with pytest.raises(ValueError, match="a scalar model has no vocabulary"):
        load_scorer(Network(tiny_folder(tmp_path / "model"), head="torch"))
    with pytest.raises(ValueError, match="a scalar model has no vocabulary"):
        ScalarAdapter(LanguageModel(model), Network("adapter", head="torch"), "value")
