"""Every causal language model of the installed transformers, built small, and compared with transformers itself."""

from __future__ import annotations

import collections
import contextlib
import io
import tempfile
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor
from tqdm.auto import tqdm
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from lit_align.functional.packing import pack
from lit_align.models.language import LanguageModel
from lit_align.models.load import load_causal_lm
from lit_align.models.network import Network
from lit_align.rollout import Sampling
from lit_align.rollout.transformers_engine import TransformersEngine
from lit_align.types import Example, Segment

VOCABULARY = 101
ARCHITECTURES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
LARGEST = 20_000_000  # parameters

# Sizes by the names that configurations give them; a name that a configuration lacks is left out.
_WIDTH = ("hidden_size", "n_embd", "d_model", "dim", "emb_dim", "embedding_size", "word_embed_proj_dim", "lru_width")
_DEPTH = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers", "depth")
_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads", "encoder_attention_heads")
_INNER = ("intermediate_size", "ffn_dim", "d_ff", "n_inner", "decoder_ffn_dim", "encoder_ffn_dim", "ffn_hidden_size")
_LENGTH = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length")
_SIZES: dict[str, Any] = {
    **dict.fromkeys(_WIDTH, 32),
    **dict.fromkeys(_DEPTH, 2),
    **dict.fromkeys(_HEADS, 4),
    **dict.fromkeys(_INNER, 48),
    **dict.fromkeys(_LENGTH, 128),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "top_k", "moe_k"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 16),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "v_head_dim", "head_dim"), 8),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "rotary_dim", "mamba_d_state"), 8),
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "qk_rope_head_dim": 4,
    "sliding_window": 16,
    "n_group": 1,
    "topk_group": 1,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_ssm": 64,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": VOCABULARY,
    "laurel_rank": 4,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

# What an architecture needs beside that.
_MLA = {"num_key_value_heads": 4, "head_dim": 4}  # latent attention: heads are not shared
_HYBRID = {"num_hidden_layers": 4}  # every fourth layer attends
_BESIDE: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa", "minicpm3"), _MLA),
    **dict.fromkeys(("axk1", "axk2", "longcat_flash", "youtu"), _MLA),
    **dict.fromkeys(("qwen3_5", "qwen3_5_text", "qwen3_5_moe_text", "qwen3_next", "qwen4_exp_text"), _HYBRID),
    **dict.fromkeys(("bailing_hybrid", "kimi_linear"), _HYBRID),
    "bamba": {"attn_layer_indices": [1]},
    "dots1": {"num_key_value_heads": 4},
    "dots3_note_text": {"num_key_value_heads": 4},
    "gemma3n_text": {"num_hidden_layers": 10, "num_kv_shared_layers": 0, "layer_types": None},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 16},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "lfm3": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 4, "head_dim": 16, "expand": 2, "n_groups": 1, "state_size": 8},
    "recurrent_gemma": {"num_hidden_layers": 3, "lru_width": 32},
    "reformer": {
        "is_decoder": True,
        "axial_pos_shape": [8, 16],
        "axial_pos_embds_dim": [16, 16],
        "attn_layers": ["local", "lsh"],
    },
    "roc_bert": {"enable_pronunciation": False, "enable_shape": False},
    "xlstm": {"hidden_size": 64},
    "zamba": {"num_hidden_layers": 3, "layers_block_type": ["mamba", "mamba", "hybrid"]},
    "zamba2": {"num_hidden_layers": 3, "layers_block_type": ["mamba", "mamba", "hybrid"]},
    "zaya": {"num_experts_per_tok": 1},
}
_DECODERS = ("bert", "roberta", "camembert", "xlm-roberta", "xlm-roberta-xl", "data2vec-text", "electra", "ernie")
_DECODERS += ("megatron-bert", "rembert", "roformer", "bert-generation", "big_bird", "roberta-prelayernorm", "xmod")
_BESIDE |= {name: {**_BESIDE.get(name, {}), "is_decoder": True} for name in (*_DECODERS, "roc_bert")}


def small_config(model_type: str) -> PreTrainedConfig:
    """The configuration of an architecture with two layers of width 32.

    Raises:
        Exception: whatever the architecture raises where these sizes do not go together.
    """
    made = CONFIG_MAPPING[model_type]
    try:
        whole = made().to_dict()
    except Exception:  # some have required parts
        whole = {}
    return made(**_shrunk(made, whole, _BESIDE.get(model_type, {})))


def _shrunk(made: Any, whole: dict[str, Any], beside: dict[str, Any]) -> dict[str, Any]:
    names = {*whole, *getattr(made, "attribute_map", {})}
    sizes = {name: size for name, size in _SIZES.items() if name in names}
    if whole.get("sliding_window", 0) is None:
        sizes.pop("sliding_window", None)
    for name, part in getattr(made, "sub_configs", {}).items():
        inner = whole.get(name)
        if isinstance(inner, dict):
            kind = CONFIG_MAPPING[inner["model_type"]] if inner.get("model_type") in CONFIG_MAPPING else part
            sizes[name] = {**({"model_type": inner["model_type"]} if "model_type" in inner else {})}
            sizes[name] |= _shrunk(kind, inner, _BESIDE.get(inner.get("model_type", ""), {}))
    return {**sizes, **beside}


class Outcome(NamedTuple):
    """What became of an architecture.

    Attributes:
        kind: right, refused, not built or wrong.
        how: how rows and rollouts are computed, or the reason.
    """

    kind: str
    how: str


def build(model_type: str) -> PreTrainedModel:
    """A small model in fp32 with random weights.

    Raises:
        ValueError: it is too large.
    """
    config = small_config(model_type)
    with torch.device("meta"):
        count = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if count > LARGEST:
        raise ValueError(f"{count / 1e6:,.0f} million parameters at the smallest")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for weight in model.parameters():
        if weight.dim() > 1 and not weight.any():  # a start that training leaves; loading takes it for damage
            torch.nn.init.normal_(weight.data, std=0.02)
    return model


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]


def examine(model_type: str) -> Outcome:
    """Compare log-probabilities, a loss and rollouts of an architecture with those of transformers alone."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")
        try:
            plain = build(model_type)
            probe = torch.arange(5, 9)[None]
            logits = plain(input_ids=probe).logits
            if logits.shape[-1] < 10 or not logits.isfinite().all():
                raise ValueError("no logits of a vocabulary that are numbers")
        except Exception as error:
            return Outcome("not built", f"{type(error).__name__}: {_first_line(error)}")
        try:
            plain.save_pretrained(folder)
            policy = LanguageModel(load_causal_lm(Network(folder))).eval()
        except ValueError as error:
            return Outcome("refused", _first_line(error).replace(repr(folder), "the model"))
        return _compared(plain, policy)


@torch.no_grad()
def _compared(plain: PreTrainedModel, policy: LanguageModel) -> Outcome:
    high = min(VOCABULARY, plain.config.get_text_config().vocab_size) - 3
    ids = [[3 + (11 * i + 5 * k) % high for i in range(n)] for k, n in enumerate((4, 3, 6, 5, 24))]
    batch = pack([_example(ids[0], ids[1], ids[2]), _example(ids[3], ids[1]), _example(ids[1], ids[4])], row_tokens=40)
    got = policy(batch).logps_S
    sequences = [ids[0] + ids[1], ids[0] + ids[2], ids[3] + ids[1], ids[1] + ids[4]]
    starts = [4, 4, 5, 3]
    expected = torch.cat([_logps(plain, s)[k - 1 :] for s, k in zip(sequences, starts, strict=True)])
    if got.shape != expected.shape or not torch.allclose(got, expected, atol=2e-3, rtol=1e-3):
        far = (got - expected).abs().max().item() if got.shape == expected.shape else float("nan")
        return Outcome("wrong", f"log-probabilities differ by {far:.3g} nats")
    prompts = [torch.tensor(ids[k]) for k in (0, 2, 3)]
    engine = TransformersEngine()
    try:
        greedy = engine(policy, prompts, Sampling(max_new_tokens=6, temperature=0.0), [2], seed=0)
        drawn = engine(policy, prompts, Sampling(max_new_tokens=5, samples=3), [2, *range(3, 40)], seed=0)
    except ValueError as error:
        return Outcome("refused", f"rollouts: {_first_line(error)}")
    for prompt, (completion,) in zip(prompts, greedy, strict=True):
        if completion.tokens != _greedy(plain, prompt.tolist(), 6):
            return Outcome("wrong", "greedy completions are not the most probable tokens")
    for prompt, completions in zip(prompts, drawn, strict=True):
        for completion in completions:
            scored = _logps(plain, prompt.tolist() + completion.tokens)[len(prompt) - 1 :]
            if not torch.allclose(torch.tensor(completion.logps, dtype=scored.dtype), scored, atol=2e-3, rtol=1e-3):
                return Outcome("wrong", "sampled log-probabilities are not those of a full forward")
    rows = "trees" if policy.packs else "one sequence a row" if policy.pads else "sequences of one length"
    return Outcome("right", f"rows: {rows}; completions: {policy.decoding}")


def _example(prompt: list[int], *answers: list[int]) -> Example:
    branches = [Segment(answer, [True] * len(answer)) for answer in answers]
    return Example(Segment(prompt, [False] * len(prompt)), branches)


def _logps(plain: PreTrainedModel, tokens: list[int]) -> Tensor:
    """Log-probability of each token but the first, by the model alone."""
    ids = torch.tensor([tokens])
    logps = plain(input_ids=ids).logits[0].float().log_softmax(-1)
    return logps[:-1].gather(1, ids[0, 1:, None])[:, 0]


def _greedy(plain: PreTrainedModel, tokens: list[int], count: int) -> list[int]:
    """By a full forward for each token, without any cache."""
    said: list[int] = []
    while len(said) < count and 2 not in said:
        said.append(int(plain(input_ids=torch.tensor([tokens + said])).logits[0, -1].argmax()))
    return said


HEAD = """# Architectures

Every causal language model of transformers {version} was built small from its configuration class, with random
weights, and compared with transformers alone: log-probabilities of a packed batch with a full forward of each sequence,
greedy completions with the most probable token of a full forward, and the log-probabilities of sampled completions with
those of a full forward. The command that writes this page:

```sh
python tests/support/architectures.py
```

- **right**: all of it agrees. Rows are *trees* where a prompt is computed once for all its completions. A model that
  takes no such rows gets *one sequence a row*, or *sequences of one length* if padding changes its states. Completions
  are *cached* where sequences that have stopped leave the batch. Some caches need every sequence to *stay*. Without a
  usable cache each token is *recomputed* by a full forward, which is slow. A probe of the model decides, and a warning
  says so.
- **refused**: an error of one line before anything is trained.
- **not built**: transformers cannot build it this small, or not from tokens alone. The same probes run when such a
  model is loaded.

{counts}

"""


def page(outcomes: dict[str, Outcome]) -> str:
    """The outcomes as a page of the documentation."""
    counts = collections.Counter(outcome.kind for outcome in outcomes.values())
    lines = ["| architecture | outcome | how, or why not |", "|---|---|---|"]
    for name, outcome in outcomes.items():
        how = outcome.how.replace("|", "/").replace("<", "&lt;").replace("`", "")
        lines.append(f"| `{name}` | {outcome.kind} | {how} |")
    said = ", ".join(f"{count} {kind}" for kind, count in counts.most_common())
    return HEAD.format(version=transformers.__version__, counts=f"{len(outcomes)} architectures: {said}.") + "\n".join(
        [*lines, ""]
    )


if __name__ == "__main__":
    Path(__file__).parents[2].joinpath("docs", "architectures.md").write_text(
        page({name: examine(name) for name in tqdm(ARCHITECTURES)})
    )
