"""What a step costs as sequences, completions and vocabularies grow: `python scaling.py`.

One forward and backward of DPO's log-probabilities on random tokens, packed and prefix-shared beside the same model on
padded rows in which each answer repeats its prompt; along completions also beside the same rankings as pairs, and a
reward model on both. Each point is a process of its own, for its peak memory, and the
median of three runs. Writes `results/scaling-<device>.json` and a figure.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig

from lit_align.accelerate.rotary import put_on_rotary
from lit_align.accelerate.tree_attention import put_on_tree_attention
from lit_align.functional.packing import pack
from lit_align.models import LanguageModel
from lit_align.models.scalar import ScalarModel
from lit_align.types import Example, PackedBatch, Segment

HERE = Path(__file__).parent
# Where nothing else is said: 8 prompts of 128 to 384 tokens with two answers of 32 to 96, and 32,000 words.
AXES: dict[str, list[int]] = {
    "length": [128, 256, 512],
    "completions": [1, 2, 4, 8],
    "vocabulary": [2_000, 32_000, 128_000],
    "prompts": [4, 8, 16],
}
COLORS = {"packed": "#0072B2", "padded": "#D55E00", "pairs": "#9ca3af", "reward": "#009E73", "reward pairs": "#CC79A7"}
USUAL = {"length": 256, "completions": 2, "vocabulary": 32_000, "prompts": 8}


def examples(length: int, completions: int, vocabulary: int, prompts: int) -> list[Example]:
    """Ragged ones: a length of L is between L / 2 and 3 L / 2, and an answer a quarter of it."""
    draw = torch.Generator().manual_seed(0)

    def segment(mean: int, scored: bool) -> Segment:
        count = int(torch.randint(mean // 2, mean * 3 // 2, (), generator=draw))
        return Segment(torch.randint(3, vocabulary, (count,), generator=draw).tolist(), [scored] * count)

    return [
        Example(segment(length, False), [segment(length // 4, True) for _ in range(completions)])
        for _ in range(prompts)
    ]


def as_pairs(rankings: list[Example]) -> list[Example]:
    """Every pair of answers as an example of its own."""
    return [Example(trunk, list(pair)) for trunk, answers in rankings for pair in combinations(answers, 2)]


def ways(axis: str, value: int) -> list[str]:
    """What is measured at a point. The 28 pairs of eight answers do not fit into a laptop."""
    if axis != "completions":
        return ["packed", "padded"]
    return [way for way in COLORS if not way.endswith("pairs") or 1 < value <= 4]


def point(way: str, device: str, **sizes: int) -> dict[str, float]:
    """Seconds of a forward and backward, and peak memory."""
    torch.manual_seed(0)
    torch.set_num_threads(2)
    shape = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 6, "intermediate_size": 1024}
    config = LlamaConfig(
        vocab_size=sizes["vocabulary"], max_position_embeddings=4096, tie_word_embeddings=True, **shape
    )
    rewards = way.startswith("reward")
    config.num_labels = 1
    model = (AutoModelForSequenceClassification if rewards else AutoModelForCausalLM).from_config(config)
    if way != "padded":
        put_on_tree_attention(model)
        put_on_rotary(model)
    model = ScalarModel(model.to(device)) if rewards else LanguageModel(model.to(device))
    made = examples(**sizes)
    made = as_pairs(made) if way.endswith("pairs") else made
    layout: dict[str, Any] = {"share_prefix": False, "packing": False} if way == "padded" else {"row_tokens": 1024}
    batch = PackedBatch(*(x.to(device) for x in pack(made, **layout)))
    times = []
    for _ in range(4):
        started = time.perf_counter()
        (model(batch) if rewards else model(batch).logps_S).sum().backward()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
        model.zero_grad()
    peak = (
        torch.cuda.max_memory_allocated()
        if device == "cuda"
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    )
    return {"seconds": statistics.median(times[1:]), "peak_mb": peak / 2**20}


def figure(results: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Seconds and memory along each axis, on logarithmic scales."""
    from matplotlib.figure import Figure

    plot = Figure(figsize=(10, 4.4), layout="constrained")
    axes = plot.subplots(2, len(results))
    for column, (axis, points) in enumerate(results.items()):
        for row, (measure, unit) in enumerate((("seconds", "seconds"), ("peak_mb", "peak memory, MB"))):
            ax = axes[row][column]
            for way, color in COLORS.items():
                here = [p for p in points if p["way"] == way]
                if here:
                    ax.plot(
                        [p[axis] for p in here], [p[measure] for p in here], "o-", color=color, label=way, markersize=3
                    )
            ax.set(xscale="log", yscale="log")
            ax.set_xticks([p[axis] for p in points if p["way"] == "packed"])
            ax.set_xticklabels([f"{p[axis]:,}" for p in points if p["way"] == "packed"], fontsize=7)
            ax.minorticks_off()
            low, high = (f(p[measure] for p in points) for f in (min, max))
            marks = [low * (high / low) ** (i / 3) for i in range(4)]
            ax.set_yticks(marks, [f"{mark:.2g}" if row == 0 else f"{mark:,.0f}" for mark in marks], fontsize=7)
            ax.spines[["top", "right"]].set_visible(False)
            if row == 0:
                ax.set_title({"length": "tokens of a prompt"}.get(axis, axis), loc="left", fontsize=9)
            if column == 0:
                ax.set_ylabel(unit, fontsize=8)
    axes[0][list(results).index("completions")].legend(frameon=False, fontsize=7)
    plot.savefig(path)


def main() -> None:
    """Measure every point, one after another."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--point", help=argparse.SUPPRESS)
    told = parser.parse_args()
    if told.point:
        print(json.dumps(point(**json.loads(told.point))))
        return
    points = [
        (axis, {**USUAL, axis: value, "way": way, "device": told.device})
        for axis, values in AXES.items()
        for value in values
        for way in ways(axis, value)
    ]
    results: dict[str, list[dict[str, Any]]] = {axis: [] for axis in AXES}
    for axis, options in track(points, "points"):
        command = [sys.executable, __file__, "--point", json.dumps(options)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{options}\n{done.stderr[-2000:]}")
        results[axis].append({**options, **json.loads(done.stdout.strip().splitlines()[-1])})
    told.out.mkdir(parents=True, exist_ok=True)
    (told.out / f"scaling-{told.device}.json").write_text(json.dumps(results, indent=2) + "\n")
    figure(results, told.out / f"scaling-{told.device}.svg")
    for axis, measured in results.items():
        for p in measured:
            print(f"{axis} {p[axis]:>7,} {p['way']:7} {p['seconds']:7.3f} s {p['peak_mb']:7,.0f} MB")


if __name__ == "__main__":
    main()
