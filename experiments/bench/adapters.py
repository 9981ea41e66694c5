"""Memory of adapters: PPO, its four models on one backbone, beside SFT: `python adapters.py --assets /tmp/bench`.

Both train adapters of rank 16 on the same model, each round in a process of its own. The table says how many tokens
the largest forward had, padding included, and how many of them were scored. On a CPU freed memory goes back to the
system, unlike in an ordinary run, whose peak is that of the heap with its gaps; `--keep-freed` measures that.
Writes `results/adapters-<device>.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from pathlib import Path
from typing import Any

from run import HERE, commit, once

# What the C library does where nobody tells it otherwise: see `lit_align.modules.memory.keep_freed_memory`.
GIVE_BACK = {"MALLOC_MMAP_MAX_": "65536", "MALLOC_TRIM_THRESHOLD_": "131072"}

# SFT's micro-batch is its batch, of about as many tokens as PPO's of 16 answers.
CASES = {
    "sft_lora": ["sft", "{model}", "6", "batch=8"],
    "ppo_lora": ["ppo", "{model}", "2", "batch=32", "micro_batch=16"],
}


def summarise(runs: list[dict[str, Any]]) -> dict[str, int]:
    """The median peak, and the largest forward."""
    memory = "peak_gpu_mb" if runs[0]["peak_gpu_mb"] else "peak_rss_mb"
    return {
        "peak_mb": int(statistics.median(run[memory] for run in runs)),
        # What the interpreter and its libraries take before there is a model; on a GPU they are not counted.
        "start_mb": 0 if runs[0]["peak_gpu_mb"] else int(statistics.median(run["start_rss_mb"] for run in runs)),
        "most_tokens": max(run["most_tokens"] for run in runs),
        "most_scored": max(run["most_scored"] for run in runs),
    }


def table(results: dict[str, dict[str, int]], ratio: float, above_start: float) -> str:
    """Markdown."""
    lines = [
        "| method | peak MB | before the model | tokens of the largest forward | scored |",
        "|---|---|---|---|---|",
    ]
    for name, r in results.items():
        lines.append(f"| {name} | {r['peak_mb']:,} | {r['start_mb']:,} | {r['most_tokens']:,} | {r['most_scored']:,} |")
    return "\n".join([*lines, "", f"Ratio: {ratio:.2f}; without what is held before the model: {above_start:.2f}."])


def main() -> None:
    """Measure in turns, write, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", required=True, help="what assets.py wrote")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--model", help="m25 on a CPU, qwen05 or qwen15 on a GPU")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--keep-freed", action="store_true", help="the heap as an ordinary run has it; writes nothing")
    told = parser.parse_args()
    if not told.keep_freed:
        os.environ.update(GIVE_BACK)
    model = told.model or ("m25" if told.device == "cpu" else "qwen05")
    common = [f"assets={told.assets}", f"device={told.device}", f"threads={told.threads}", "lora=true"]
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in CASES}
    for _ in range(told.rounds):
        for name, words in CASES.items():
            command = [word.format(model=model) for word in words]
            runs[name].append(once([sys.executable, str(HERE / "ours.py"), *command, *common]))
    results = {name: summarise(of_case) for name, of_case in runs.items()}
    sft, ppo = results["sft_lora"], results["ppo_lora"]
    ratio = ppo["peak_mb"] / sft["peak_mb"]
    above_start = (ppo["peak_mb"] - ppo["start_mb"]) / (sft["peak_mb"] - sft["start_mb"])
    if told.keep_freed:
        print(table(results, ratio, above_start))
        return
    told.out.mkdir(parents=True, exist_ok=True)
    written = {
        "model": model, "commit": commit(), "rounds": told.rounds, "versions": runs["sft_lora"][0]["versions"],
        "ratio": round(ratio, 2), "ratio_above_start": round(above_start, 2), "results": results,
    }  # fmt: skip
    (told.out / f"adapters-{told.device}.json").write_text(json.dumps(written, indent=2) + "\n")
    print(table(results, ratio, above_start))


if __name__ == "__main__":
    main()
