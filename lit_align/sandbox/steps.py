"""The two steps of the pipeline that only an embedded world can take: make its tokenizer, and ask its annotators."""

from __future__ import annotations

import contextlib
import json
import random
from collections import Counter
from pathlib import Path

from lit_align.models.scratch import word_tokenizer, write_seed_model
from lit_align.sandbox.annotators import Annotators
from lit_align.sandbox.sources import prompt_from
from lit_align.sandbox.world import World
from lit_align.utils.disk import replacing


class SeedModel:
    """Writes a folder to start from: a tokenizer with the world's words, and the configuration of a tiny Llama.

    Args:
        seed: which world.
        hidden_size: width.
        layers: depth.
        heads: attention heads.
        intermediate_size: width of the feed-forward layers.
        max_positions: longest sequence.
        init_std: standard deviation of the random weights; a narrow model wants more than the usual 0.02.
    """

    def __init__(
        self,
        seed: int = 0,
        hidden_size: int = 128,
        layers: int = 4,
        heads: int = 4,
        intermediate_size: int = 320,
        max_positions: int = 128,
        init_std: float = 0.05,
    ) -> None:
        self.seed = seed
        self.shape = {
            "hidden_size": hidden_size,
            "layers": layers,
            "heads": heads,
            "intermediate_size": intermediate_size,
            "max_positions": max_positions,
            "init_std": init_std,
        }

    def run(self, out: Path) -> dict[str, float]:
        """Write `model/`."""
        tokenizer = word_tokenizer(World(self.seed).vocabulary())
        write_seed_model(tokenizer, out / "model", **self.shape)  # type: ignore[arg-type]
        return {"vocabulary": float(len(tokenizer))}


class Annotate:
    """Asks the simulated annotators to rank sampled answers.

    Args:
        completions: what `lit-align predict` wrote: prompts with K answers each.
        annotators: how they judge.
        seed: which world, and of the annotators' noise.
    """

    def __init__(self, completions: str, annotators: Annotators | None = None, seed: int = 0) -> None:
        self.completions = Path(completions)
        self.annotators = annotators or Annotators()
        self.seed = seed

    def run(self, out: Path) -> dict[str, float]:
        """Write `train.jsonl` and `held_out.jsonl`, by the side of the world the prompt is from."""
        world, rng = World(self.seed), random.Random(f"annotators {self.seed}")
        out.mkdir(parents=True, exist_ok=True)
        counts: Counter[str] = Counter()
        with contextlib.ExitStack() as stack:
            partial = {name: stack.enter_context(replacing(out / f"{name}.jsonl")) for name in ("train", "held_out")}
            files = {name: stack.enter_context(path.open("w")) for name, path in partial.items()}
            for line in self.completions.read_text().splitlines():
                row = json.loads(line)
                ranks = self.annotators.rank(world, prompt_from(row), row["completions"], row["finished"], rng)
                files[row["split"]].write(json.dumps({**row, "ranks": ranks}) + "\n")
                counts[row["split"]] += 1
        return {f"{split}_prompts": float(count) for split, count in counts.items()}
