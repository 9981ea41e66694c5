"""A packed, prefix-shared batch gives the log-probabilities of each sequence alone."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny import ARCHITECTURES, VOCABULARY, norms_in_float64, tiny_config, tiny_folder
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import lit_align.accelerate.tree_attention
import lit_align.models.language
from lit_align.accelerate.tree_attention import put_on_tree_attention, tree_blocks
from lit_align.functional.head import linear_logprobs
from lit_align.functional.packing import pack
from lit_align.models import LanguageModel, Network, ScalarModel, load_causal_lm, load_scorer
from lit_align.types import Example, PackedBatch, Segment

LENGTHS = [(5, 3, 7, 2), (9, 1, 2, 4), (3, 8, 8, 1), (12, 4, 4, 6)]
LAYOUTS = [
    {}, {"row_tokens": 60}, {"packing": False}, {"share_prefix": False}, {"packing": False, "share_prefix": False},
]  # fmt: skip


def examples(vocabulary: int = VOCABULARY) -> list[Example]:
    """Prompts with three answers each."""
    draw = torch.Generator().manual_seed(1)

    def segment(length: int, scored: bool) -> Segment:
        return Segment(torch.randint(0, vocabulary, (length,), generator=draw).tolist(), [scored] * length)

    return [Example(segment(n, False), [segment(k, True) for k in answers]) for n, *answers in LENGTHS]


@torch.no_grad()
def alone(model: PreTrainedModel) -> torch.Tensor:
    """The plain way: one sequence, full logits, no mask."""
    scores = []
    for trunk, branches in examples(model.config.get_text_config().vocab_size):
        for branch in branches:
            ids = torch.tensor([[*trunk.tokens, *branch.tokens]])
            logps = model(ids).logits[0, len(trunk.tokens) - 1 : -1].log_softmax(-1)
            scores.append(logps.gather(-1, torch.tensor(branch.tokens)[:, None])[:, 0])
    return torch.cat(scores)


def model_of(config: AutoConfig, by_tree: bool = False) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval()
    if by_tree:
        put_on_tree_attention(model)
    return model


@pytest.mark.parametrize("together", [None, 0, 40])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_layout_scores_as_alone(
    architecture: str, layout: dict, together: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_tree = together is not None
    monkeypatch.setattr(lit_align.accelerate.tree_attention, "TOGETHER", together)
    model = model_of(tiny_config(architecture), by_tree)
    with norms_in_float64():
        language = LanguageModel(model)
        assert language.packs
        assert language.by_tree == by_tree
        assert (language(pack(examples(), **layout)).logps_S - alone(model)).abs().max() < 1e-12


# Kills: a tree's mask without its branches; rows' ends computed (their states would have a gradient).
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_attention_by_tree_has_the_gradient_of_the_mask(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = pack([*examples(), Example(Segment([5, 6, 7], [False, True, True]))], row_tokens=50)
    gradients = []
    for by_tree, together in ((False, 0), (True, 0), (True, 40)):
        monkeypatch.setattr(lit_align.accelerate.tree_attention, "TOGETHER", together)
        model = model_of(tiny_config(architecture), by_tree)
        with norms_in_float64():
            scored = LanguageModel(model)(batch)
            (scored.logps_S * torch.arange(batch.num_scored)).sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    for mask, alone, grouped in zip(*gradients, strict=True):
        assert (mask - alone).abs().max() < 1e-10
        assert (mask - grouped).abs().max() < 1e-10


def test_who_attends_by_tree(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "model")
    loaded = LanguageModel(load_causal_lm(Network(folder)))
    assert loaded.by_tree
    assert not LanguageModel(load_causal_lm(Network(folder, attention="sdpa"))).by_tree
    assert not LanguageModel(load_causal_lm(Network(folder, attention="eager"))).by_tree
    assert ScalarModel(load_scorer(Network(folder))).by_tree
    # Windows are for the mask to draw.
    assert not LanguageModel(model_of(tiny_config("mistral", **SLIDING["mistral"]), by_tree=True)).by_tree
    # What a run leaves behind knows nothing of it.
    loaded.hf.save_pretrained(tmp_path / "exported")
    assert "lit_align" not in (tmp_path / "exported" / "config.json").read_text()


def test_a_model_that_attends_by_tree_takes_the_mask_as_well() -> None:
    """As it must when it is moved to a GPU."""
    model = model_of(tiny_config("qwen3"), by_tree=True)
    with norms_in_float64():
        language = LanguageModel(model)
        language.by_tree = False
        assert (language(pack(examples(), row_tokens=60)).logps_S - alone(model)).abs().max() < 1e-12


# Kills: trees lost, joined above the limit, or not joined below it; a group of chains taken for one chain.
def test_small_trees_share_a_block_and_large_ones_have_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lit_align.accelerate.tree_attention, "TOGETHER", 10)
    chains = [Example(Segment([5] * n, [False] * n)) for n in (4, 6, 1, 20, 3, 8)]
    chains.append(Example(Segment([5] * 12, [False] * 12), [Segment([5] * 9, [True] * 9)]))  # one branch is none
    batch = pack([*chains, examples()[0]], row_tokens=100)
    in_row = batch.tree_RN[0][batch.tree_RN[0] >= 0]
    order = torch.unique_consecutive(in_row).tolist()
    sizes = [(in_row == tree).sum().item() for tree in order]
    blocks = tree_blocks(in_row, batch.branch_RN[0][: len(in_row)], batch.positions_RN[0][: len(in_row)], torch.float32)
    assert sum(blocks.lengths) == sum(sizes)
    expected: list[list[int]] = []
    for size in sizes:
        if expected and sum(expected[-1]) + size <= 10:
            expected[-1].append(size)
        else:
            expected.append([size])
    assert blocks.lengths == [sum(group) for group in expected]
    assert max(map(len, expected)) > 1
    for length, group, mask in zip(blocks.lengths, expected, blocks.masks, strict=True):
        assert (mask is None) == (len(group) == 1 and group != [sum(LENGTHS[0])])
        assert mask is None or mask.shape == (1, 1, length, length)


# Kills: anything but what lies before it reaching a token by way of the one row that all trees share.
def test_a_tree_attends_to_itself_alone() -> None:
    language = LanguageModel(model_of(tiny_config("llama"), by_tree=True))
    batch = pack(examples())
    first = batch.tree_RN == 0
    changed = batch._replace(tokens_RN=torch.where(first, 9, batch.tokens_RN), target_S=batch.target_S)
    of_first = batch.example_Q[batch.sequence_S] == 0
    one, other = language(batch).logps_S, language(changed).logps_S
    assert torch.equal(one[~of_first], other[~of_first])
    assert not torch.equal(one[of_first], other[of_first])


SLIDING = {
    "mistral": {"sliding_window": 4, "num_key_value_heads": 2},
    "gemma2": {"sliding_window": 4, "head_dim": 8, "num_key_value_heads": 2, "final_logit_softcapping": 5.0},
    "gemma3_text": {
        "sliding_window": 4,
        "head_dim": 8,
        "num_key_value_heads": 2,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "cohere": {"logit_scale": 0.3},
    "granite": {"logits_scaling": 3.0},
}


@pytest.mark.parametrize("kind", SLIDING)
def test_windows_caps_and_scales_are_kept(kind: str) -> None:
    model = model_of(tiny_config(kind, **SLIDING[kind]))
    language = LanguageModel(model)
    assert language.packs
    got = language(pack(examples())).logps_S
    # These architectures round to fp32 inside.
    assert (got - alone(model)).abs().max() < 1e-4


@pytest.mark.parametrize("kind", ["mamba", "bloom"])
def test_a_model_without_tree_masks_says_so_and_scores_the_same(kind: str) -> None:
    config = AutoConfig.for_model(kind, vocab_size=40, hidden_size=32, num_hidden_layers=2, n_layer=2, n_head=4)
    model = model_of(config)
    with pytest.warns(UserWarning, match="takes no mask of trees"):
        language = LanguageModel(model)
    got = language(pack(examples(40))).logps_S
    assert (got - alone(model)).abs().max() < 1e-4


def test_padding_reaches_no_score() -> None:
    language = LanguageModel(model_of(tiny_config("llama")))
    batch = pack(examples(), row_tokens=50)
    assert (batch.tree_RN < 0).any()
    changed = batch._replace(tokens_RN=torch.where(batch.tree_RN < 0, 7, batch.tokens_RN))
    assert torch.equal(language(batch).logps_S, language(changed).logps_S)


def test_eager_attention_takes_the_mask_too() -> None:
    config = tiny_config("llama", attn_implementation="eager")
    config._attn_implementation = "eager"
    model = model_of(config)
    assert model.config._attn_implementation == "eager"
    assert (LanguageModel(model)(pack(examples())).logps_S - alone(model)).abs().max() < 1e-6


def test_temperature_and_nucleus_shape_the_scores() -> None:
    language = LanguageModel(model_of(tiny_config("llama")))
    batch = pack(examples())
    plain = language(batch)
    cool = language(batch, temperature=0.5, top_p=0.9, entropies=True)
    logits = language.logits(plain.hidden_SH) / 0.5
    assert torch.isfinite(cool.logps_S).all()
    assert (cool.logps_S >= logits.log_softmax(-1).gather(-1, batch.target_S[:, None])[:, 0] - 1e-12).all()
    assert cool.entropies_S is not None
    assert not cool.entropies_S.requires_grad
    assert plain.entropies_S is None


def test_scalar_model_reads_the_last_token(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "model")
    scorer = ScalarModel(load_scorer(Network(folder, dtype="float64")))
    batch = pack(examples())
    with norms_in_float64(), torch.no_grad():
        scores = scorer(batch)
        values = scorer.values(batch)
        expected = []
        for trunk, branches in examples():
            for branch in branches:
                ids = torch.tensor([[*trunk.tokens, *branch.tokens]])
                hidden = scorer.backbone(ids).last_hidden_state[0]
                expected.append(scorer.head(hidden))
    ends = [line[-1] for line in expected]
    assert torch.allclose(scores, torch.stack(ends), atol=1e-12)
    before = torch.cat([line[-1 - n : -1] for line, n in zip(expected, torch.bincount(batch.sequence_S), strict=True)])
    assert torch.allclose(values, before, atol=1e-12)


def test_half_precision_leaves_in_fp32(tmp_path: Path) -> None:
    network = Network(tiny_folder(tmp_path / "model"), dtype="bfloat16")
    assert LanguageModel(load_causal_lm(network))(pack(examples())).logps_S.dtype == torch.float32
    scorer = ScalarModel(load_scorer(network))
    assert scorer(pack(examples())).dtype == torch.float32


def test_probe_leaves_no_warning_where_trees_are_taken() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert LanguageModel(model_of(tiny_config("llama"))).packs


def test_batches_of_no_branch_are_plain_sequences() -> None:
    model = model_of(tiny_config("llama"))
    tokens = [5, 6, 7, 8, 9]
    batch: PackedBatch = pack([Example(Segment(tokens, [False, False, True, True, False]))])
    with norms_in_float64(), torch.no_grad():
        logps = model(torch.tensor([tokens])).logits[0].log_softmax(-1)
        got = LanguageModel(model)(batch).logps_S
    assert torch.allclose(got, torch.stack([logps[1, 7], logps[2, 8]]), atol=1e-12)


@pytest.mark.parametrize("top_p", [1.0, 0.8])
def test_the_head_in_chunks_is_the_head(top_p: float) -> None:
    model = model_of(tiny_config("llama"))
    batch = pack(examples())

    def scores(dense_bytes: int, **attributes: Any) -> list[Tensor]:
        language = LanguageModel(model)
        language.dense_bytes = dense_bytes
        vars(language).update(attributes)
        model.zero_grad()
        scored = language(batch, 0.7, top_p, entropies=True)
        (scored.logps_S * torch.arange(len(scored.logps_S))).sum().backward()
        assert scored.entropies_S is not None
        return [scored.logps_S, scored.entropies_S, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    with norms_in_float64():
        dense, small = scores(2**30, _plain_head=lambda: False), 4 * VOCABULARY * 5
        ways = {
            "checkpointed": scores(small, _plain_head=lambda: False),
            "made again": scores(small),
            "kept": scores(2**30),
            "kept, looked at in chunks": scores(2**30, cached_bytes=small),
        }
    for way, chunked in ways.items():
        assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(dense, chunked, strict=True)), way


# Kills: logits of the states in fp32, or three copies of them, where autocast would have one product in half precision.
def test_under_autocast_the_head_is_that_of_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(tiny_config("llama")).float()
    batch = pack(examples())

    def scores(autocast: bool = True, **attributes: Any) -> list[Tensor]:
        language = LanguageModel(model)
        vars(language).update(attributes)
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            scored = language(batch, entropies=True)
        (scored.logps_S * torch.arange(len(scored.logps_S))).sum().backward()
        assert scored.entropies_S is not None
        return [scored.logps_S, scored.entropies_S, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    calls: list[Any] = []
    monkeypatch.setattr(
        lit_align.models.language, "linear_logprobs", lambda *call: calls.append(call) or linear_logprobs(*call)
    )
    expected, got = scores(_plain_head=lambda: False), scores()
    assert [call[1].dtype for call in calls] == [torch.bfloat16]
    assert got[0].dtype == torch.float32
    for theirs, ours in zip(expected[:2], got[:2], strict=True):
        assert (theirs - ours).abs().max() <= 1e-2 * theirs.abs().max()
    # How bf16 rounds a gradient depends on the processor: the two differ by less than half of what bf16 itself costs.
    exact = scores(autocast=False)
    for right, theirs, ours in zip(exact[2:], expected[2:], got[2:], strict=True):
        assert (theirs - ours).abs().max() <= (theirs - right).abs().max() / 2
    assert torch.allclose(expected[0], got[0], atol=1e-5)


def chunks_of(language: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> tuple[list[tuple], list[int]]:
    """Rows of logits looked at together and held at once, or made at once by a head that is no mere matrix."""
    by_hand: list[tuple] = []
    checkpointed: list[int] = []

    def recorded(*call: Any) -> Any:
        by_hand.append(call[6:8])
        return linear_logprobs(*call)

    monkeypatch.setattr(lit_align.models.language, "linear_logprobs", recorded)
    head = language.hf.get_output_embeddings()
    handle = head.register_forward_hook(lambda *call: checkpointed.append(len(call[2])))
    with norms_in_float64():
        language(pack(examples()))
        language(pack(examples()))
    handle.remove()
    return by_hand, checkpointed


SCORED = sum(sum(answers) for _, *answers in LENGTHS)


def test_large_logits_are_made_in_chunks_and_it_is_said(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    language = LanguageModel(model_of(tiny_config("llama")))
    language.dense_bytes = 4 * VOCABULARY * 10
    with caplog.at_level("INFO"):
        by_hand, checkpointed = chunks_of(language, monkeypatch)
    assert by_hand == [(2**24 // (4 * VOCABULARY), 10)] * 2
    assert checkpointed == []
    assert caplog.text.count("vocabulary head: chunked") == 1
    capped = LanguageModel(model_of(tiny_config("gemma2", **SLIDING["gemma2"])))
    capped.dense_bytes = language.dense_bytes
    by_hand, checkpointed = chunks_of(capped, monkeypatch)
    assert by_hand == []
    assert sum(checkpointed) == 2 * SCORED
    assert max(checkpointed) <= 10


# Kills: chunks of a CPU larger than its cache; kept logits above the limit; chunks where the head is no mere matrix.
def test_small_logits_are_kept_and_looked_at_in_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    def made(config: Any, **attributes: Any) -> tuple[list[tuple], list[int]]:
        language = LanguageModel(model_of(config))
        vars(language).update(attributes)
        return chunks_of(language, monkeypatch)

    rows, held = 2**24 // (4 * VOCABULARY), 2**30 // (4 * VOCABULARY)
    assert made(tiny_config("llama")) == ([(rows, held)] * 2, [])
    assert made(tiny_config("llama"), cached_bytes=4 * VOCABULARY * 10) == ([(10, held)] * 2, [])
    assert made(tiny_config("cohere", **SLIDING["cohere"])) == ([], [SCORED, SCORED])
