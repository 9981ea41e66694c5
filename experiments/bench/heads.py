"""Time and memory of the ways from states to log-probabilities: `python experiments/bench/heads.py`.

A forward and backward of the vocabulary head alone, on random states, each way in a process of its own: the median of
five after a warm-up, and what the process grew by. On a CPU one thread, and the processor's time, of which a machine
that others use takes no more. On a GPU: `--device cuda`, and bf16 beside fp32 (`--dtype`).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from lit_align.functional.fused_heads import liger_logprobs, torch_logprobs
from lit_align.functional.head import linear_logprobs


def own(held: float, cached: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """lit_align's pass, with memory for a share of the logits."""

    def logps(hidden_SH: Tensor, weight_VH: Tensor, target_S: Tensor) -> Tensor:
        chunk, hold = max(cached // (4 * len(weight_VH)), 1), max(int(held * len(hidden_SH)), 1)
        return linear_logprobs(hidden_SH, weight_VH, target_S, chunk=chunk, hold=hold)[0]

    return logps


def all_logits(hidden_SH: Tensor, weight_VH: Tensor, target_S: Tensor) -> Tensor:
    """As it is usually written."""
    return -nn.functional.cross_entropy((hidden_SH @ weight_VH.T).float(), target_S, reduction="none")


def ways(device: str) -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """What can be measured here."""
    cached = 2**24 if device == "cpu" else 2**27
    measured = {
        "logits and cross_entropy": all_logits,
        "own, held": own(1, cached),
        "own, made again": own(0.25, cached),
    }
    if hasattr(nn, "LinearCrossEntropyOptions"):
        measured["torch"] = torch_logprobs
    if device == "cuda" and importlib.util.find_spec("liger_kernel"):
        measured["liger"] = liger_logprobs
    return measured


def memory(device: str) -> int:
    """The most that was held, in bytes."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(way: str, told: argparse.Namespace) -> dict[str, float]:
    """Seconds, and bytes above what was there."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    scored, width, vocabulary = told.sizes
    options = {"device": told.device, "dtype": getattr(torch, told.dtype)}
    hidden_SH = torch.randn(scored, width, **options).requires_grad_()
    weight_VH = (torch.randn(vocabulary, width, **options) * 0.02).requires_grad_()
    target_S = torch.randint(0, vocabulary, (scored,), device=told.device)
    weights_S = torch.rand(scored, device=told.device)
    head, before, times = ways(told.device)[way], memory(told.device), []
    clock = time.perf_counter if told.device == "cuda" else time.process_time
    for _ in range(6):
        hidden_SH.grad = weight_VH.grad = None
        started = clock()
        (head(hidden_SH, weight_VH, target_S) * weights_S).sum().backward()
        if told.device == "cuda":
            torch.cuda.synchronize()
        times.append(clock() - started)
    return {"seconds": statistics.median(times[1:]), "mb": (memory(told.device) - before) / 2**20}


def main() -> None:
    """A table, a process for each line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs=3, default=[2_000, 256, 32_000], help="scored tokens, width, words")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--way", help=argparse.SUPPRESS)
    told = parser.parse_args()
    if told.way:
        print(json.dumps(measure(told.way, told)))
        return
    print("| head | seconds | MB |\n|---|---|---|")
    for way in ways(told.device):
        done = subprocess.run([sys.executable, *sys.argv, "--way", way], stdout=subprocess.PIPE, text=True, check=True)
        figures = json.loads(done.stdout.strip().splitlines()[-1])
        print(f"| {way} | {figures['seconds']:.2f} | {figures['mb']:,.0f} |", flush=True)


if __name__ == "__main__":
    main()
