"""What both sides are timed on: `python assets.py OUT` writes rows and models with random weights.

The data is public (GSM8K, GPTeacher role-play, HH-RLHF harmless pairs), read from the folder of LIT_ALIGN_DATA. The
models are Llamas with a 32k BPE vocabulary trained on that text, m25 (23 M parameters) and m3 (5 M); `--real` adds the
shapes of Qwen2.5-0.5B and 1.5B, for a GPU. The rows are in TRL's conversational form, which lit_align reads too, so
that both sides tokenise the same text with the same template.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from lit_align.models import Lora, Network, load_scorer
from lit_align.models.roles import save_adapter

TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ eos_token }}{% endgeneration %}{% endif %}{{ '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
SHAPES = {
    "m25": {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 6, "intermediate_size": 1024},
    "m3": {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 384},
}
REAL = {
    "qwen05": {"hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14, "intermediate_size": 4864},
    "qwen15": {"hidden_size": 1536, "num_hidden_layers": 28, "num_attention_heads": 12, "intermediate_size": 8960},
}


def demonstrations(data: Path) -> Iterator[dict[str, Any]]:
    """GSM8K and role-play, in turns: short and long answers."""
    short = [(r["question"], r["answer"]) for r in map(json.loads, (data / "gsm8k/train.jsonl").open())]
    long = [
        (f"{r['instruction']}\n{r['input']}".strip(), r["response"])
        for r in json.loads((data / "gpteacher/roleplay.json").read_text())
    ]
    for pair in zip(short, long, strict=False):
        for prompt, answer in pair:
            if answer.strip():
                yield {
                    "prompt": [{"role": "user", "content": prompt}],
                    "completion": [{"role": "assistant", "content": answer}],
                }


def preferences(data: Path) -> Iterator[dict[str, Any]]:
    """Human pairs whose two dialogues differ in the last turn only."""
    with gzip.open(data / "hh_rlhf/harmless-base-test.jsonl.gz", "rt") as file:
        for row in map(json.loads, file):
            chosen, rejected = _turns(row["chosen"]), _turns(row["rejected"])
            if chosen[:-1] == rejected[:-1] and chosen != rejected and chosen[-1]["role"] == "assistant":
                yield {"prompt": chosen[:-1], "chosen": chosen[-1:], "rejected": rejected[-1:]}


def _turns(text: str) -> list[dict[str, str]]:
    turns = []
    for part in text.split("\n\nHuman:")[1:]:
        question, *answers = part.split("\n\nAssistant:")
        turns.append({"role": "user", "content": question.strip()})
        turns += [{"role": "assistant", "content": answer.strip()} for answer in answers]
    return turns


def tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 32,000 tokens."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<|pad|>", "<|eos|>", "<|user|>", "<|assistant|>", "<|system|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=32_000, special_tokens=special, initial_alphabet=alphabet)
    bpe.train_from_iterator(texts, trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<|pad|>", eos_token="<|eos|>")
    made.chat_template = TEMPLATE
    return made


def main() -> None:
    """Write everything."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--real", action="store_true", help="also the shapes of Qwen2.5-0.5B and 1.5B")
    told = parser.parse_args()
    data = Path(os.environ["LIT_ALIGN_DATA"])
    told.out.mkdir(parents=True, exist_ok=True)
    rows = {"sft": list(demonstrations(data)), "pairs": list(preferences(data))}
    for name, of_kind in rows.items():
        (told.out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in of_kind))
    texts = [
        turn["content"] for of_kind in rows.values() for row in of_kind for turns in row.values() for turn in turns
    ]
    tok = tokenizer(texts)
    common: dict[str, Any] = {
        "vocab_size": len(tok), "max_position_embeddings": 2048, "tie_word_embeddings": True,
        "pad_token_id": tok.pad_token_id, "eos_token_id": tok.eos_token_id, "bos_token_id": None,
    }  # fmt: skip
    short = [row["prompt"] for row in rows["sft"] if len(tok(row["prompt"][0]["content"])["input_ids"]) <= 56]
    (told.out / "prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in short))
    configs: dict[str, Any] = {
        name: LlamaConfig(**shape, num_key_value_heads=shape["num_attention_heads"], **common)
        for name, shape in SHAPES.items()
    }
    if told.real:
        # The vocabulary of the real ones: the head is a third of the work there.
        large = {**common, "vocab_size": 151_936}
        configs |= {name: Qwen2Config(**shape, num_key_value_heads=2, **large) for name, shape in REAL.items()}
    for name, config in configs.items():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        model.save_pretrained(told.out / name)
        tok.save_pretrained(told.out / name)
        config.num_labels = 1
        AutoModelForSequenceClassification.from_config(config).save_pretrained(told.out / f"{name}-reward")
        tok.save_pretrained(told.out / f"{name}-reward")
        # A reward model that is an adapter on the model, as `lora: {export: adapter}` leaves it.
        scorer = load_scorer(Network(str(told.out / name), lora=Lora(export="adapter")))
        save_adapter(scorer, told.out / f"{name}-reward-adapter")
        print(f"{name}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters")


if __name__ == "__main__":
    main()
