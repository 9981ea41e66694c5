"""lit_align against TRL, interleaved in one run: a table, a figure, `results/<device>.json`.

    python experiments/bench/assets.py /tmp/bench
    python -m venv /tmp/trl && /tmp/trl/bin/pip install trl==1.16.0
    python -m venv /tmp/trl-ppo && /tmp/trl-ppo/bin/pip install trl==1.12.0 'transformers<5.20'
    python experiments/bench/run.py --assets /tmp/bench --trl /tmp/trl/bin/python --trl-ppo /tmp/trl-ppo/bin/python

Every figure is the median of its rounds, and a ratio is between medians of the same run: lone times of a shared
machine say little. Both sides get the same examples, truncation, batch, optimizer and precision; loading and the first
two steps are left out. On a GPU: `--device cuda`, bf16, the shapes of Qwen2.5.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

HERE = Path(__file__).parent


@dataclass
class Case:
    """One line of the table: a method on a model, ours and the peer's way to run it."""

    name: str
    method: str
    steps: int
    peer: str = "trl"
    ours: list[str] = field(default_factory=list)
    theirs: list[str] = field(default_factory=list)

    def command(self, side: str, python: str, model: str, common: list[str]) -> list[str]:
        """How to run a side."""
        script = "ours.py" if side == "ours" else {"trl": "peer_trl.py", "trl-ppo": "peer_trl_ppo.py"}[self.peer]
        own = self.ours if side == "ours" else self.theirs
        return [python, str(HERE / script), self.method, model, str(self.steps), *common, *own]


def cases(device: str) -> list[Case]:
    """What is compared."""
    if device == "cpu":
        return [
            Case("sft", "sft", 12),
            Case("reward", "reward", 10),
            Case("dpo", "dpo", 8),
            Case("ppo", "ppo", 4, "trl-ppo", ["batch=32"], ["batch=32"]),
            Case("grpo", "grpo", 6, "trl", ["batch=32", "new_tokens=64"], ["batch=32", "new_tokens=64"]),
        ]
    return [
        Case("sft", "sft", 60, ours=["batch=32"], theirs=["batch=32"]),
        # A step of TRL's has 32 packed rows, and so more examples than ours; what is compared is examples a second.
        Case("sft_packing", "sft", 60, ours=["batch=32"], theirs=["batch=32", "packing=true"]),
        Case("reward", "reward", 40, ours=["batch=32"], theirs=["batch=32"]),
        Case("dpo", "dpo", 40, ours=["batch=32"], theirs=["batch=32"]),
        Case(
            "dpo_cached",
            "dpo",
            40,
            ours=["batch=32", "cached=true"],
            theirs=["batch=32", "precompute_ref_log_probs=true"],
        ),
        Case("ppo", "ppo", 6, "trl-ppo", ["batch=64"], ["batch=64"]),
        Case("grpo", "grpo", 8, "trl", ["batch=64", "new_tokens=64"], ["batch=64", "new_tokens=64"]),
    ]


def once(command: list[str]) -> dict[str, Any]:
    """Run a side; its last line is JSON."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\nfailed:\n{done.stderr[-3000:]}")
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def matrix_rate(device: str) -> float:
    """FLOP/s of a large matrix product: the most that a model could do here."""
    size, dtype = (8192, torch.bfloat16) if device == "cuda" else (1024, torch.float32)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    times = []
    for _ in range(12):
        wait()
        started = time.perf_counter()
        torch.mm(a, b)
        wait()
        times.append(time.perf_counter() - started)
    return 2 * size**3 / statistics.median(times[2:])


def commit() -> str:
    """Of the code that is measured; with a + where files differ from it."""
    git = ["git", "-C", str(HERE)]
    done = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    changed = subprocess.run([*git, "status", "--porcelain", "--", "../../lit_align"], capture_output=True, text=True)
    return (done.stdout.strip() or "unknown") + "+" * bool(changed.stdout)


def summarise(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Median and spread of a side's rounds."""
    rates = sorted(run["examples_per_s"] for run in runs)
    memory = "peak_gpu_mb" if runs[0]["peak_gpu_mb"] else "peak_rss_mb"
    return {
        "examples_per_s": round(statistics.median(rates), 3),
        "lowest": round(rates[0], 3),
        "highest": round(rates[-1], 3),
        "peak_mb": int(statistics.median(run[memory] for run in runs)),
        **({"gflop_per_example": runs[0]["gflop_per_example"]} if "gflop_per_example" in runs[0] else {}),
    }


def table(results: dict[str, dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "| method | lit_align, examples/s | TRL, examples/s | ratio | lit_align, peak MB | TRL, peak MB | ratio "
        "| lit_align, share of the matrix product's rate |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, r in results.items():
        ours, theirs = r["lit_align"], r["peer"]
        lines.append(
            f"| {name} | {ours['examples_per_s']:.2f} | {theirs['examples_per_s']:.2f} | **{r['ratio']:.2f}x** "
            f"| {ours['peak_mb']:,} | {theirs['peak_mb']:,} | {r['memory_ratio']:.2f}x "
            f"| {format(r['utilisation'], '.0%') if 'utilisation' in r else 'not measured'} |"
        )
    return "\n".join(lines)


def figure(results: dict[str, dict[str, Any]], path: Path) -> None:
    """Bars: rate and memory as a share of the peer's."""
    from matplotlib.figure import Figure

    plot = Figure(figsize=(7, 2.6), layout="constrained")
    for ax, key, title in zip(
        plot.subplots(1, 2),
        ("ratio", "memory_ratio"),
        ("speed, times TRL's", "peak memory, share of TRL's"),
        strict=True,
    ):
        bars = ax.bar(list(results), [r[key] for r in results.values()], color="#0072B2", width=0.6)
        ax.bar_label(bars, fmt="%.2f", padding=2)
        ax.axhline(1, color="#9ca3af", linewidth=1)
        ax.set_title(title, loc="left", fontsize=10)
        ax.spines[["top", "right"]].set_visible(False)
        ax.margins(y=0.15)
    plot.savefig(path)


def main() -> None:
    """Interleave, summarise, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", required=True, help="what assets.py wrote")
    parser.add_argument("--trl", required=True, help="python of an environment with trl==1.16.0")
    parser.add_argument("--trl-ppo", help="python of an environment with trl==1.12.0; without it PPO is left out")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--model", help="m25 on a CPU, qwen05 or qwen15 on a GPU")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="*", help="names of cases")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    told = parser.parse_args()
    common = [f"assets={told.assets}", f"device={told.device}"]
    pythons = {"ours": sys.executable, "trl": told.trl, "trl-ppo": told.trl_ppo}
    model = told.model or ("m25" if told.device == "cpu" else "qwen05")
    chosen = [c for c in cases(told.device) if (not told.only or c.name in told.only) and pythons[c.peer]]
    runs: dict[str, dict[str, list[dict[str, Any]]]] = {c.name: {"ours": [], "peer": []} for c in chosen}
    rates: dict[str, list[float]] = {c.name: [] for c in chosen}
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("rounds", total=2 * told.rounds * len(chosen))
        for _ in range(told.rounds):
            for case in chosen:
                rates[case.name].append(matrix_rate(told.device))
                size = "m3" if case.method in ("ppo", "grpo") and told.device == "cpu" else model
                for side, python in (("ours", pythons["ours"]), ("peer", pythons[case.peer])):
                    runs[case.name][side].append(once(case.command(side, str(python), size, common)))
                    progress.advance(task)
    results = {}
    for case in chosen:
        ours, peer = (summarise(runs[case.name][side]) for side in ("ours", "peer"))
        rate = statistics.median(rates[case.name])
        results[case.name] = {
            "model": runs[case.name]["ours"][0]["model"],
            "lit_align": ours,
            "peer": peer,
            "ratio": round(ours["examples_per_s"] / peer["examples_per_s"], 2),
            "memory_ratio": round(ours["peak_mb"] / peer["peak_mb"], 2),
            # Of what the model's products could reach here, no operation beside them taking any time.
            "utilisation": round(ours["gflop_per_example"] * 1e9 * ours["examples_per_s"] / rate, 3),
            "matrix_product_gflops": round(rate / 1e9, 1),
            "rounds": told.rounds,
            "commit": commit(),
        }
    name = torch.cuda.get_device_name() if told.device == "cuda" else f"{torch.get_num_threads()}-core CPU"
    written = {
        "device": name,
        "machine": platform.machine(),
        "versions": {c.peer: runs[c.name]["peer"][0]["versions"] for c in chosen}
        | {"lit_align": runs[chosen[0].name]["ours"][0]["versions"]},
        "ratios": {case: r["ratio"] for case, r in results.items()},
        "memory_ratios": {case: r["memory_ratio"] for case, r in results.items()},
        "results": results,
    }
    told.out.mkdir(parents=True, exist_ok=True)
    # What `--only` left out stays as an earlier run measured it.
    file = told.out / f"{told.device}.json"
    if told.only and file.exists():
        earlier = json.loads(file.read_text())
        for key in ("versions", "ratios", "memory_ratios", "results"):
            written[key] = earlier[key] | written[key]
        results = written["results"]
    file.write_text(json.dumps(written, indent=2) + "\n")
    figure(results, told.out / f"{told.device}.svg")
    print(table(results))


if __name__ == "__main__":
    main()
