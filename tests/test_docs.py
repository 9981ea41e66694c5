"""The documentation: every page is reachable, and its commands run as they stand, in order, on a tiny model."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from support.tiny import tiny_folder
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
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


def test_every_page_is_in_the_navigation() -> None:
    # Material's configuration holds tags that a plain loader does not know; the list of pages does not.
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text().split("nav:\n")[1])
    assert {file for entry in site for file in entry.values()} == {page.name for page in PAGES}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_yaml_block_is_yaml(page: Path) -> None:
    for block in blocks(page):
        if block.language == "yaml":
            assert yaml.safe_load(block.text), block.title


def place(folder: Path) -> None:
    """What the pages take for granted: a chat model in models/base, and small files in data/."""
    base = folder / "models" / "base"
    tiny_folder(base, "llama")
    AutoModelForCausalLM.from_pretrained(base).float().save_pretrained(base)
    tokenizer: Any = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(base)

    def rows(name: str, made: list[dict]) -> None:
        (folder / "data").mkdir(exist_ok=True)
        (folder / "data" / name).write_text("".join(json.dumps(row) + "\n" for row in made))

    every = range(40)
    rows("instructions.jsonl", [{"instruction": f"Say {i}.", "input": "", "output": f"It is {i}."} for i in every])
    rows("pairs.jsonl", [{"prompt": f"Say {i}.", "chosen": f"It is {i}.", "rejected": "No."} for i in every])
    rows("prompts.jsonl", [{"prompt": f"Say {i}."} for i in every])
    rows("sums.jsonl", [{"prompt": f"What is {i} + 1?", "reference": str(i + 1)} for i in every])


RUN = [page for page in PAGES if any(block.language == "bash" for block in blocks(page))]


@pytest.mark.slow
@pytest.mark.parametrize("page", RUN, ids=lambda page: page.stem)
def test_every_command_runs_in_order(page: Path, tmp_path: Path) -> None:
    place(tmp_path)
    scripts = Path(sys.executable).parent
    environment = {**os.environ, "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}"}
    for block in blocks(page):
        if block.title:
            (tmp_path / block.title).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / block.title).write_text(block.text)
        elif block.language == "bash":
            command = ["bash", "-eu", "-c", block.text]
            done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
            assert done.returncode == 0, f"{page.name}:\n{block.text}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
