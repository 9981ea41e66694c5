"""Fill the numbers of README.md and experiments/*/README.md from result files: `python experiments/write_numbers.py`.

A number stands in a marked block, `<!-- numbers: NAME -->...<!-- /numbers -->`, on one line or on several. NAME is a
key of `BLOCKS` below. `--check` only reports blocks that differ from their result file, as tests/test_numbers.py does.
"""

from __future__ import annotations

import json
import re
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

EXPERIMENTS = Path(__file__).resolve().parent
ROOT = EXPERIMENTS.parent
sys.path.insert(0, str(EXPERIMENTS / "sandbox"))

from table import markdown, markdown_of_means  # noqa: E402

PAGES = [ROOT / "README.md", *sorted(EXPERIMENTS.glob("*/README.md"))]
BLOCK = re.compile(r"(<!-- numbers: ([\w-]+) -->)(\n?)(.*?)(<!-- /numbers -->)", re.DOTALL)
BLOCKS: dict[str, Callable[[], str]] = {}


def block(function: Callable[[], str]) -> Callable[[], str]:
    """Add a function to `BLOCKS` by its name."""
    BLOCKS[function.__name__.replace("_", "-")] = function
    return function


def results(name: str) -> dict[str, Any]:
    """A result file, as in `results("sandbox/seeds")`."""
    folder, file = name.split("/")
    return json.loads((EXPERIMENTS / folder / "results" / f"{file}.json").read_text())


def seeds_mean(name: str, title: str) -> str:
    """The mean over the seeds of the line with this title."""
    row = next(row for row in results(name)["rows"] if row["title"] == title)
    return f"{mean(row['values']):{row['format']}}"


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def prose(text: str) -> str:
    """A paragraph, broken at 120 characters."""
    return textwrap.fill(text, 120, break_on_hyphens=False, break_long_words=False)


def origin(name: str) -> str:
    """The commit of a result file's runs."""
    told = results(name)
    return f"runs of commit {told.get('runs_of_commit') or told['commit']}"


@block
def versions() -> str:
    """The versions that pyproject.toml admits."""
    text = (ROOT / "pyproject.toml").read_text()

    def admitted(name: str) -> str:
        low, major, minor = re.findall(rf'^(?:    "|requires-){name}.*?>=(\d+\.\d+)[\d.]*,<(\d+)\.(\d+)', text, re.M)[0]
        return " to ".join(dict.fromkeys([low, f"{major}.{int(minor) - 1}"]))  # the upper bound is exclusive

    return ", ".join(f"{name} {admitted(name.lower())}" for name in ("Python", "torch", "lightning", "transformers"))


# The embedded world.


@block
def demo_time() -> str:
    """How long the demo takes, alone on the machine."""
    return f"about {mean(results('sandbox/seeds')['seconds_alone']) / 60:.0f} minutes"


@block
def sandbox_seeds() -> str:
    """Every seed, and the means."""
    told = results("sandbox/seeds")
    return f"{markdown(told)}\n\n{markdown_of_means(told)}"


@block
def sandbox_estimators() -> str:
    """Every estimator, and the means."""
    told = results("sandbox/estimators")
    return f"{markdown(told)}\n\n{markdown_of_means(told)}"


@block
def sandbox_arithmetic() -> str:
    """Sums that a program checks."""
    return markdown(results("sandbox/arithmetic"))


@block
def methods() -> str:
    """Name, page, YAML and one number of each method."""

    def over(title: str) -> str:
        return f"gold {seeds_mean('sandbox/seeds', title)} over {title.split(' over ')[1].split(':')[0]}"

    def earlier(title: str) -> str:
        return f"gold {seeds_mean('sandbox/estimators', f'{title} over SFT: gold reward')} over SFT \\*"

    midtraining = results("midtraining/midtraining")
    before = midtraining["instructions"][sum(step < midtraining["decay_begins"] for step in midtraining["steps"]) - 1]
    rows = [
        ("SFT, DFT, NEFTune", "sft", "sandbox/sft", over("SFT over base: gold reward")),
        (
            "midtraining (WSD)",
            "sft",
            "midtraining/midtrain",
            f"loss on instructions {before:.2f} to {midtraining['instructions'][-1]:.2f} nats",
        ),
        (
            "reward model: pairs, rankings, regression",
            "reward",
            "sandbox/reward",
            f"{seeds_mean('sandbox/seeds', 'reward model against gold, gap above 0.5')} of pairs right",
        ),
        ("PPO, PPO-ptx", "ppo", "sandbox/ppo", over("PPO over SFT: gold reward")),
        ("DPO and its family, KTO", "dpo", "sandbox/dpo", over("DPO over SFT: gold reward")),
        ("RLOO", "ppo", "sandbox/rloo", earlier("RLOO")),
        ("GRPO", "ppo", "sandbox/grpo", earlier("GRPO")),
        ("Dr. GRPO", "ppo", "sandbox/dr_grpo", earlier("Dr. GRPO")),
        ("DAPO", "ppo", "sandbox/dapo", earlier("DAPO")),
        ("REINFORCE++", "ppo", "sandbox/reinforce_pp", earlier("REINFORCE++")),
        ("ReMax", "ppo", "sandbox/remax", earlier("ReMax")),
        ("RAFT", "sft", "sandbox/estimators", earlier("RAFT")),
        ("iterative DPO", "dpo", "sandbox/estimators", earlier("iterative DPO")),
    ]

    def page(module: str) -> str:
        return f"[`{module}.py`](lit_align/modules/{module}.py)"

    return (
        table(
            ["method", "page", "YAML", "number"],
            [
                [name, page(module), f"[`{yaml}`](experiments/{yaml}.yaml)", number]
                for name, module, yaml, number in rows
            ],
        )
        + f"\n\n{_methods_origin()}"
    )


def _methods_origin() -> str:
    """Which runs the numbers of the method table are of."""
    new, old = results("sandbox/seeds"), results("sandbox/estimators")
    text = prose(
        f"Gold is the world's true reward. Numbers are means over the seeds {new['seeds'][0]} to {new['seeds'][-1]}, "
        f"{origin('sandbox/seeds')}; midtraining is one seed, "
        f"{origin('midtraining/midtraining')}."
    )
    earlier = prose(
        f"\\* Of an earlier recipe of the world, seeds {old['seeds'][0]} to {old['seeds'][-1]}, "
        f"{origin('sandbox/estimators')}: compare these with each other alone. Not measured on the recipe of today."
    )
    return f"{text}\n\n{earlier}"


# Real text.


def interval(told: dict[str, Any]) -> str:
    """An accuracy with its 95 % interval."""
    return f"{told['accuracy']:.3f} (95 % interval {told['low']:.3f} to {told['high']:.3f})"


@block
def polite() -> str:
    """Scores of three policies, and the accuracy of the reward model."""
    told = results("polite/polite")
    gains = [f"{gain:+.2f} ± {error:.2f}" for gain, error in told["gain"].values()]
    scores = [f"{score:+.2f}" for score in told["score"].values()]
    rows = [["reward model's mean score", *scores], ["gain over SFT, paired, with its standard error", "", *gains]]
    text = prose(
        f"The reward model is right on {interval(told['reward'])} of {told['reward']['pairs']} held-out pairs. "
        f"Preferring the shorter answer gives {told['reward']['shorter']:.2f}. Seed {told['seed']}, 2 CPU cores, "
        f"{told['seconds']:,} s in all; {origin('polite/polite')}."
    )
    return table([f"held-out prompts ({told['prompts']})", "SFT", "DPO", "PPO"], rows) + f"\n\n{text}"


@block
def hh() -> str:
    """Accuracy on human pairs."""
    told = results("hh/hh")
    return prose(
        f"Of {told['pairs']:,} pairs, the reader skips those whose two dialogues differ before the last turn; the log "
        f"counts them. After two epochs the held-out accuracy on pairs is {interval(told)}. Preferring the shorter "
        f"answer gives {told['shorter']:.3f}. Over the validations of the run the accuracy stays between "
        f"{told['lowest_validation']:.2f} and {told['highest_validation']:.2f}. Seed {told['seed']}, "
        f"{told['seconds']:,} s on one busy core; {origin('hh/hh')}."
    )


@block
def oasst() -> str:
    """Accuracy on human rankings."""
    told = results("oasst/oasst")
    return prose(
        f"{told['trees']} trees hold {told['prompts']} ranked prompts; {told['cut']} of them are cut to the maximal "
        f"length. After four epochs the held-out accuracy on pairs is {interval(told)}, clustered by prompt. People "
        f"preferred the longer answer in {told['longer']:.0%} of the held-out pairs. Seed {told['seed']}, "
        f"{told['seconds']:,} s on one busy core; {origin('oasst/oasst')}."
    )


@block
def gsm8k() -> str:
    """Loss on the test solutions."""
    told = results("gsm8k/gsm8k")
    return prose(
        f"{told['loss']:.2f} nats a token on the {told['test_rows']:,} test solutions (perplexity "
        f"{told['perplexity']:.1f}). Seed {told['seed']}, {told['seconds']:,} s on one busy core; "
        f"{origin('gsm8k/gsm8k')}."
    )


@block
def midtraining() -> str:
    """Losses on instructions and on text."""
    told = results("midtraining/midtraining")
    rows = [
        [f"`val/loss/{name}`, nats a token", *(f"{loss:.2f}" for loss in told[name])]
        for name in ("instructions", "text")
    ]
    return (
        table(["optimizer steps", *map(str, told["steps"])], rows)
        + f"\n\nSeed {told['seed']}, one CPU core; the decay begins at step {told['decay_begins']}; "
        f"{origin('midtraining/midtraining')}."
    )


# Speed, memory, faults.


@block
def speed() -> str:
    """Ratios to TRL, for the README."""
    told = results("bench/cpu")
    names = list(told["ratios"])
    rows = [["examples a second, times TRL's", *(f"{told['ratios'][name]:.2f}" for name in names)]]
    rows.append(["peak memory, share of TRL's", *(f"{told['memory_ratios'][name]:.2f}" for name in names)])
    titles = {"sft": "SFT", "reward": "reward model", "dpo": "DPO", "ppo": "PPO", "grpo": "GRPO"}
    return f"{table(['', *(titles[name] for name in names)], rows)}\n\n{_speed_origin()}"


def _speed_origin() -> str:
    """What the benchmark ran with."""
    told = results("bench/cpu")
    versions, cases = told["versions"], told["results"].values()
    commits = " and ".join(dict.fromkeys(case["commit"] for case in cases))
    rounds = max(case["rounds"] for case in cases)
    return prose(
        f"Measured on a {told['device']} in fp32, against TRL {versions['trl']['trl']}; PPO against TRL "
        f"{versions['trl-ppo']['trl']}, since later versions have no PPO. Medians of {rounds} interleaved rounds, "
        f"commit {commits}. On a GPU: not measured."
    )


@block
def bench() -> str:
    """The benchmark's table."""
    told = results("bench/cpu")["results"]
    head = [
        "method",
        "lit_align, examples/s",
        "TRL, examples/s",
        "ratio",
        "lit_align, peak MB",
        "TRL, peak MB",
        "ratio",
    ]
    rows = [
        [
            name,
            f"{r['lit_align']['examples_per_s']:.2f}",
            f"{r['peer']['examples_per_s']:.2f}",
            f"**{r['ratio']:.2f}x**",
            f"{r['lit_align']['peak_mb']:,}",
            f"{r['peer']['peak_mb']:,}",
            f"{r['memory_ratio']:.2f}x",
            f"{r['utilisation']:.0%}" if "utilisation" in r else "not measured",
        ]
        for name, r in told.items()
    ]
    rates = [r["matrix_product_gflops"] for r in told.values()]
    return (
        table([*head, "lit_align, share of the matrix product's rate"], rows)
        + "\n\nA matrix product of 1,024, measured before each case, ran at "
        f"{min(rates):.0f} to {max(rates):.0f} GFLOP/s."
    )


@block
def adapters() -> str:
    """Memory of PPO with shared adapters beside SFT's."""
    told = results("bench/adapters-cpu")
    keys = ("peak_mb", "start_mb", "most_tokens", "most_scored")
    rows = [[name, *(f"{r[key]:,}" for key in keys)] for name, r in told["results"].items()]
    return (
        table(["method", "peak MB", "before the model", "tokens of the largest forward", "scored"], rows)
        + f"\n\nRatio: {told['ratio']:.2f}; without what is held before the model: {told['ratio_above_start']:.2f}. "
        f"Medians of {told['rounds']} rounds, commit {told['commit']}."
    )


@block
def heads() -> str:
    """Time and memory of the vocabulary head."""
    told = results("bench/heads-cpu")
    scored, width, words = told["sizes"]
    rows = [[name, f"{r['seconds']:.2f}", f"{r['mb']:,.0f}"] for name, r in told["results"].items()]
    text = prose(
        f"Forward and backward of {scored:,} scored tokens, states of {width} numbers, {words:,} words; fp32, one "
        f"thread, seconds of the processor. Commit {told['commit']}."
    )
    return f"{table(['head', 'seconds', 'MB'], rows)}\n\n{text}"


@block
def scaling() -> str:
    """Costs of rankings and of many completions, from the points of the curves."""
    points = results("bench/scaling-cpu")["completions"]

    def at(way: str, completions: int) -> dict[str, float]:
        return next(p for p in points if p["way"] == way and p["completions"] == completions)

    def times(way: str, other: str, measure: str, k: int = 4) -> str:
        return f"{at(way, k)[measure] / at(other, k)[measure]:.2f}"

    def growth(way: str) -> str:
        return f"{at(way, 8)['seconds'] / at(way, 1)['seconds']:.1f}"

    return prose(
        f"A reward model on rankings of four answers takes {times('reward', 'reward pairs', 'seconds')} times as long "
        f"as on the same rankings as pairs, in {times('reward', 'reward pairs', 'peak_mb')} times the memory; the "
        f"log-probabilities of DPO take {times('packed', 'pairs', 'seconds')} times as long. Eight answers to a prompt "
        f"cost {growth('packed')} times one answer; in padded rows they cost {growth('padded')} times."
    )


@block
def faults() -> str:
    """What the runs that were killed came to."""
    told = results("faults/faults")
    differ, lost = (sum(len(module[key]) for module in told["modules"].values()) for key in ("differ", "lost_or_torn"))
    runs = sum(module["runs"] for module in told["modules"].values())
    return f"{told['kills']} kills of {runs} runs: {differ} runs differ, {lost} files are lost or torn"


def filled(text: str) -> str:
    """A page with its blocks written anew.

    Raises:
        KeyError: a block has a name that `BLOCKS` lacks.
    """

    def written(found: re.Match[str]) -> str:
        begin, name, newline, _, end = found.groups()
        return f"{begin}{newline}{BLOCKS[name]()}{newline}{end}"

    return BLOCK.sub(written, text)


def main() -> int:
    """Write or check; the exit status is 1 if a check fails."""
    differ = [page for page in PAGES if filled(page.read_text()) != page.read_text()]
    if "--check" in sys.argv[1:]:
        for page in differ:
            print(f"{page.relative_to(ROOT)} differs from its result files: run python experiments/write_numbers.py")
        return int(bool(differ))
    for page in differ:
        page.write_text(filled(page.read_text()))
        print(f"wrote {page.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
