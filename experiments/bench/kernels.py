"""What each kernel of `lit_align/accelerate` gains in a training step, and those of the head and of decoding.

    python experiments/bench/kernels.py --model runs/smollm2/base/model

A training step is the scoring of a batch, its loss, the backward, clipping and AdamW, all in fp32; of GRPO also the
sampling. Each kernel is taken off alone, and the others stay. In one process the ways take turns, step by step, in an
order that changes. A gain is the share of the step without the kernel that the kernel saves: the median over rounds,
each of which takes the shortest of its steps, the one that other programs disturbed least. Tokens are random, from a
seed: their number is what counts. The model is the one that `experiments/smollm2` makes.

`--memory` adds peak memory, each way in a process of its own whose C library gives freed memory back, and `--heap` what
is gained by keeping it, as a run does. Writes `results/kernels-cpu.json`, and each kernel's gains into the docstring of
its file; `--beside` does only that.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import random
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from run import HERE, commit

FILE = "kernels-cpu.json"
LEAST = 0.03  # of a training step, for a kernel to keep its place
METHODS = ("sft", "reward", "dpo", "grpo")
# What is taken off or replaced, one at a time, beside the kernels of `accelerate`.
KERNELS = ("norm", "rotary", "last_layer", "tree_attention")
OTHERS = ("head", "cache", "draw")
OF = {
    "sft": (*KERNELS, "head", "norm=torch"),  # and what torch offers in the place of a kernel
    "reward": KERNELS,
    "dpo": (*KERNELS, "head"),
    "grpo": OTHERS,
}
GIVE_BACK = {"MALLOC_MMAP_MAX_": "65536", "MALLOC_TRIM_THRESHOLD_": "131072"}
# A thread that waits for another in OpenMP must not count as work.
QUIET = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0"}


def batch_of(method: str, size: int) -> Any:
    """`size` examples of at most 256 tokens a sequence: a prompt of 48 to 128 and an answer of 32 to 128, or two."""
    from lit_align.functional.packing import pack
    from lit_align.types import Example, Segment

    rng = random.Random(0)

    def segment(least: int, most: int, scored: bool) -> Segment:
        length = rng.randint(least, most)
        return Segment([rng.randrange(5, 49_000) for _ in range(length)], [scored] * length)

    examples = []
    for _ in range(size):
        prompt, answers = segment(48, 128, False), [segment(32, 128, True) for _ in range(1 if method == "sft" else 2)]
        if method == "sft":
            tokens, scored = [*prompt.tokens, *answers[0].tokens], [*prompt.scored, *answers[0].scored]
            examples.append(Example(Segment(tokens, scored)))
        else:
            examples.append(Example(prompt, answers))
    return pack(examples, row_tokens=1024)


class Steps:
    """A model and its training step."""

    def __init__(self, method: str, folder: str, size: int, new_tokens: int) -> None:
        import torch

        from lit_align.models import LanguageModel, Network, ScalarModel, load_causal_lm, load_scorer

        torch.manual_seed(0)
        self.method, self.size, self.new_tokens = method, size, new_tokens
        self.model: Any = (
            ScalarModel(load_scorer(Network(folder)))
            if method == "reward"
            else LanguageModel(load_causal_lm(Network(folder)))
        )
        self.models = [self.model]
        if method == "dpo":
            self.models.append(LanguageModel(load_causal_lm(Network(folder)).requires_grad_(False).eval()))
        for parameter in self.model.parameters():  # a new scalar head, and whatever a loader froze
            parameter.requires_grad_(True)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-6, weight_decay=0.0, fused=True)
        self.batch = None if method == "grpo" else batch_of(method, size // 2 if method == "dpo" else size)

    def step(self) -> None:
        """Train on the batch once."""
        import torch

        self.optimizer.zero_grad()
        getattr(self, f"_{self.method}")().backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()

    def _sft(self) -> Any:
        return -self.model(self.batch).logps_S.mean()

    def _reward(self) -> Any:
        import torch

        score_P2 = self.model(self.batch).unflatten(0, (-1, 2))
        return -torch.nn.functional.logsigmoid(score_P2[:, 0] - score_P2[:, 1]).mean()

    def _dpo(self) -> Any:
        import torch

        with torch.no_grad():
            reference_P2 = self.models[1](self.batch).sums(self.batch).unflatten(0, (-1, 2))
        ratio_P2 = self.model(self.batch).sums(self.batch).unflatten(0, (-1, 2)) - reference_P2
        return -torch.nn.functional.logsigmoid(0.1 * (ratio_P2[:, 0] - ratio_P2[:, 1])).mean()

    def _grpo(self) -> Any:
        import torch

        from lit_align.functional.packing import pack
        from lit_align.rollout.engine import Sampling
        from lit_align.rollout.transformers_engine import TransformersEngine
        from lit_align.types import Example, Segment

        rng = random.Random(0)
        prompts = [[rng.randrange(5, 49_000) for _ in range(rng.randint(32, 96))] for _ in range(self.size // 2)]
        sampling = Sampling(max_new_tokens=self.new_tokens, samples=4)
        # No token ends an answer: all ways sample as many.
        answers = TransformersEngine()(self.model, [torch.tensor(p) for p in prompts], sampling, [], seed=0)
        examples = [
            Example(Segment(p, [False] * len(p)), [Segment(a.tokens, [True] * len(a.tokens)) for a in of_prompt])
            for p, of_prompt in zip(prompts, answers, strict=True)
        ]
        batch = pack(examples, row_tokens=1024)
        advantage_Q = torch.randn(batch.num_sequences, generator=torch.Generator().manual_seed(0))
        logps_S = self.model(batch).logps_S
        ratio_S = (logps_S - logps_S.detach()).exp()
        return -(ratio_S * advantage_Q[batch.sequence_S]).mean()

    @contextlib.contextmanager
    def way(self, without: str) -> Iterator[None]:
        """Take a kernel off, or replace it; `all` has every one on."""
        from lit_align.accelerate import accelerate
        from lit_align.rollout import decoding

        kernels = [kernel for kernel in KERNELS if kernel != without.split("=")[0]]
        undo: list[Callable[[], Any]] = []
        for model in self.models:
            accelerate(model.hf, kernels)
            model.by_tree, model.thrifty = "tree_attention" in kernels, "last_layer" in kernels
            if without == "head":
                model._plain_head = lambda: False  # logits at once, then cross_entropy
                undo.append(lambda model=model: delattr(model, "_plain_head"))
            elif without == "head=torch":
                model.head, model.dense_bytes = "torch", 0
                undo.append(lambda model=model: (setattr(model, "head", "own"), delattr(model, "dense_bytes")))
            elif without == "norm=torch":
                undo += _norms_of_torch(model.hf)
        replaced = _decoding_of_libraries(without)
        before = {name: getattr(decoding, name) for name in replaced}
        vars(decoding).update(replaced)
        try:
            yield
        finally:
            vars(decoding).update(before)
            for back in undo:
                back()


def _norms_of_torch(model: Any) -> list[Callable[[], Any]]:
    import functools

    import torch

    undo = []
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            weight, eps = module.weight, module.variance_epsilon
            module.forward = functools.partial(
                torch.nn.functional.rms_norm, normalized_shape=weight.shape, weight=weight, eps=eps
            )
            undo.append(functools.partial(delattr, module, "forward"))
    return undo


def _decoding_of_libraries(without: str) -> dict[str, Any]:
    import torch
    from transformers import DynamicCache

    if without == "cache":
        return {"roomy_cache": lambda config: DynamicCache(config=config)}
    if without == "draw":
        return {"draw": lambda probs_BV, generator: torch.multinomial(probs_BV, 1, generator=generator)[:, 0]}
    return {}


def measure(told: argparse.Namespace) -> dict[str, Any]:
    """Seconds of each way in each round, of this process's clock and of the wall; or the peak of one way."""
    import torch

    from lit_align.modules.memory import keep_freed_memory

    torch.set_num_threads(told.threads)
    if not told.given_back:
        keep_freed_memory()  # as a run of lit_align does
    steps = Steps(told.method, told.model, told.batch, told.new_tokens)
    if told.peak:
        for _ in range(2):
            with steps.way(told.peak):
                steps.step()
        return {"peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024}
    ways = ["all"] if told.alone else ["all", *OF[told.method]]
    times: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    rng = random.Random(0)
    for turn in range(told.rounds * told.steps + 1):
        for way in rng.sample(ways, len(ways)):
            with steps.way(way):
                started, cpu = time.perf_counter(), time.process_time()
                steps.step()
                if turn:  # the first of each way sets things up
                    times[way].append((time.process_time() - cpu, time.perf_counter() - started))
    # On each clock the shortest of a round's steps.
    per_round = {
        way: [
            tuple(min(step[i] for step in of_way[at : at + told.steps]) for i in (0, 1))
            for at in range(0, len(of_way), told.steps)
        ]
        for way, of_way in times.items()
    }
    tokens = 0 if steps.batch is None else int((steps.batch.tree_RN >= 0).sum())
    return {"rounds": per_round, "tokens": tokens, "torch": torch.__version__}


def summarise(rounds: dict[str, list[list[float]]]) -> dict[str, dict[str, Any]]:
    """For each way: seconds of a step, and what all kernels gain over it, by the median of the rounds."""
    summary = {}
    for way, of_way in rounds.items():
        figures: dict[str, Any] = {}
        for i, clock in enumerate(("cpu", "wall")):
            gains = sorted(1 - every[i] / without[i] for every, without in zip(rounds["all"], of_way, strict=True))
            figures[f"{clock}_seconds"] = round(statistics.median(seconds[i] for seconds in of_way), 3)
            if way != "all":
                figures[f"{clock}_gain"] = round(statistics.median(gains), 4)
                figures[f"{clock}_gain_lowest"], figures[f"{clock}_gain_highest"] = (
                    round(gains[0], 4), round(gains[-1], 4),
                )  # fmt: skip
        summary[way] = figures
    return summary


def table(results: dict[str, dict[str, dict[str, Any]]]) -> str:
    """Markdown: a line for each kernel, a column for each method."""
    names = list(dict.fromkeys(way for of_method in results.values() for way in of_method if way != "all"))
    lines = [f"| without, or replaced | {' | '.join(results)} |", "|---" * (len(results) + 1) + "|"]
    for name in names:
        cells = []
        for of_method in results.values():
            if name not in of_method:
                cells.append("")
                continue
            found = of_method[name]
            text = f"{found['cpu_gain']:.1%} ({found['cpu_gain_lowest']:.1%} to {found['cpu_gain_highest']:.1%})"
            if "peak_mb" in found and "peak_mb" in of_method["all"]:
                text += f", {found['peak_mb'] - of_method['all']['peak_mb']:+,} MB"
            cells.append(text)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    seconds = (f"{of_method['all']['cpu_seconds']:.2f} s" for of_method in results.values())
    return "\n".join([*lines, f"| a step with all | {' | '.join(seconds)} |"])


# Where a kernel's gains are written: the line of the file's docstring that begins with BEGIN.
FILES = {
    "norm": "accelerate/norm.py", "rotary": "accelerate/rotary.py", "last_layer": "accelerate/last_layer.py",
    "tree_attention": "accelerate/tree_attention.py", "head": "functional/head.py", "cache": "rollout/cache.py",
    "draw": "functional/sampling.py",
}  # fmt: skip
BEGIN = "Share of a training step that this saves (experiments/bench/kernels.py): "


def gains(results: dict[str, dict[str, dict[str, Any]]], kernel: str) -> str:
    """A kernel's gains by method, by processor time."""
    found = {method: of_method[kernel] for method, of_method in results.items() if kernel in of_method}
    return ", ".join(f"{method} {figures['cpu_gain']:.1%}" for method, figures in found.items()) or "not measured"


def write_beside(results: dict[str, dict[str, dict[str, Any]]]) -> None:
    """Write each kernel's gains into its file."""
    for kernel, name in FILES.items():
        file = HERE.parents[1] / "lit_align" / name
        lines = file.read_text().splitlines()
        lines = [f"{BEGIN}{gains(results, kernel)}." if line.startswith(BEGIN) else line for line in lines]
        file.write_text("\n".join(lines) + "\n")


def child(told: argparse.Namespace, method: str, *more: str) -> dict[str, Any]:
    """Measure in a process of its own."""
    words = [f"--model={told.model}", f"--method={method}", f"--rounds={told.rounds}", f"--steps={told.steps}"]
    words += [f"--threads={told.threads}", f"--batch={told.batch}", f"--new-tokens={told.new_tokens}", "--child"]
    command = [sys.executable, __file__, *words, *more]
    environment = {**os.environ, **QUIET, **(GIVE_BACK if "--given-back" in more else {})}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def heaps(told: argparse.Namespace, method: str) -> dict[str, Any]:
    """What it gains that freed memory is kept: two processes a round, as the C library's setting is of a process."""
    rounds: dict[str, list[list[float]]] = {"all": [], "given back": []}
    for _ in range(told.rounds):
        for way, of_round in rounds.items():
            more = ["--rounds=1", "--alone", *(["--given-back"] if way == "given back" else [])]
            of_round += child(told, method, *more)["rounds"]["all"]
    return summarise(rounds)["given back"]


def write(told: argparse.Namespace, versions: dict[str, str], tokens: dict[str, int], results: dict[str, Any]) -> None:
    """Write the result file; methods that were not measured stay as an earlier run left them."""
    told.out.mkdir(parents=True, exist_ok=True)
    file = told.out / FILE
    earlier = json.loads(file.read_text()) if file.exists() else {"tokens": {}, "results": {}}
    written = {
        "model": told.name, "machine": platform.machine(), "commit": commit(), "versions": versions,
        "rounds": told.rounds, "steps": told.steps, "threads": told.threads, "batch": told.batch,
        "new_tokens": told.new_tokens, "tokens": earlier["tokens"] | tokens, "results": earlier["results"] | results,
    }  # fmt: skip
    file.write_text(json.dumps(written, indent=2) + "\n")


def main() -> None:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of a language model")
    parser.add_argument("--name", default="SmolLM2-135M-Instruct", help="what the result file calls it")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2, help="training steps in a round")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--batch",
        type=int,
        default=4,
        help="examples; pairs of the reward model; twice those of DPO, or the prompts of four answers",
    )
    parser.add_argument("--new-tokens", type=int, default=32, help="tokens of a sampled answer")
    parser.add_argument("--memory", nargs="*", choices=METHODS, default=(), help="measure peaks of these")
    parser.add_argument("--heap", nargs="*", choices=METHODS, default=(), help="measure it for these")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--method", help=argparse.SUPPRESS)
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--given-back", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--beside", action="store_true", help="only write what was measured beside each kernel")
    told = parser.parse_args()
    if told.beside:
        write_beside(json.loads((told.out / FILE).read_text())["results"])
        return
    if told.child:
        print(json.dumps(measure(told)))
        return
    results, tokens, versions = {}, {}, {}
    for method in told.methods:
        measured = child(told, method)
        results[method], tokens[method] = summarise(measured["rounds"]), measured["tokens"]
        if method in told.heap:
            results[method]["kept memory"] = heaps(told, method)
        versions["torch"] = measured["torch"]
        print(table(results), flush=True)
        if method in told.memory:
            for way in ("all", *OF[method]):
                results[method][way] |= child(told, method, f"--peak={way}", "--given-back")
        write(told, versions, tokens, results)
    measured = json.loads((told.out / FILE).read_text())["results"]
    write_beside(measured)
    print(table(measured))


if __name__ == "__main__":
    main()
