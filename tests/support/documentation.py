"""What the documentation takes for granted: fenced blocks, a model in models/base and small files in data/."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any, NamedTuple

from transformers import AutoModelForCausalLM, AutoTokenizer

from support.tiny import tiny_folder

FENCE = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)
CHATML = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


# What a page takes for granted beside that: commands that run before its own. The files of your-model.md are there.
SHORT = "--trainer.max_epochs=-1 --trainer.max_steps=2"
BEFORE: dict[str, list[str]] = {
    "data": ["mkdir -p runs/sft && cp -r models/base runs/sft/model"],
    "exporting": [
        f"lit-align fit -c sft.yaml --out runs/mine {SHORT}",
        "cp -L runs/mine/checkpoints/last.ckpt 'runs/mine/checkpoints/step=400.ckpt'",
        f"lit-align fit -c sft.yaml --out runs/lora --model.network.lora=4 {SHORT}",
        "mkdir -p runs/sft && cp -r models/base runs/sft/model",
        "lit-align fit -c ppo.yaml --out runs/ppo --trainer.max_steps=4 --model.value=models/base"
        " --model.reward='{class_path: lit_align.LengthReward, init_args: {target: 8}}'",
    ],
    "resuming": [
        f"lit-align fit -c sft.yaml {SHORT}",
        "sed -i 's/max_epochs: 1/max_steps: 4/' sft.yaml",
    ],
    "watching": [
        "cp sft.yaml my.yaml",
        f"lit-align fit -c sft.yaml --out runs/a {SHORT}",
        f"lit-align fit -c sft.yaml --out runs/b --data.batch_size=4 {SHORT}",
    ],
}


class Block(NamedTuple):
    language: str
    title: str
    text: str


# Beside the files of your-model.md, for the pages with commands above.
FILES = [
    Block("yaml", "pipeline.yaml", "root: runs\nstages:\n  sft: {fit: sft.yaml}\n"),
    Block(
        "yaml",
        "sweep.yaml",
        "name: sft\nmethod: grid\nmetric: {name: train/loss, goal: minimize}\n"
        "parameters: {data.init_args.batch_size: {values: [4]}}\ncommand: [lit-align, fit, -c, sft.yaml, '${args}']\n",
    ),
]


def blocks(page: Path) -> list[Block]:
    """Fenced blocks. `bash` runs here; a title names the file that a block is written to; `sh` and `text` only show."""
    return [Block(*found) for found in FENCE.findall(page.read_text())]


def place(folder: Path) -> None:
    """Write a chat model to models/base, and under the name of the README's model, and small files to data/."""
    base = folder / "models" / "base"
    tiny_folder(base, "llama")
    AutoModelForCausalLM.from_pretrained(base).float().save_pretrained(base)
    tokenizer: Any = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(base)
    shutil.copytree(base, folder / "Qwen" / "Qwen2.5-0.5B-Instruct")

    def rows(name: str, made: list[dict]) -> None:
        (folder / "data").mkdir(exist_ok=True)
        (folder / "data" / name).write_text("".join(json.dumps(row) + "\n" for row in made))

    every = range(40)
    rows("instructions.jsonl", [{"instruction": f"Say {i}.", "input": "", "output": f"It is {i}."} for i in every])
    rows("pairs.jsonl", [{"prompt": f"Say {i}.", "chosen": f"It is {i}.", "rejected": "No."} for i in every])
    rows("prompts.jsonl", [{"prompt": f"Say {i}."} for i in every])
    rows("sums.jsonl", [{"prompt": f"What is {i} + 1?", "reference": str(i + 1)} for i in every])
    shutil.copy(folder / "data" / "pairs.jsonl", folder / "my_pairs.jsonl")
