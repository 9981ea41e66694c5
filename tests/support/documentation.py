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


class Block(NamedTuple):
    language: str
    title: str
    text: str


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
