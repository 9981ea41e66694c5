"""Runs of several seeds side by side: `python experiments/sandbox/table.py runs/seed-101 runs/seed-102 ...`.

Takes runs of pipeline.yaml, estimators.yaml or arithmetic.yaml and prints Markdown; lines without figures are left out.
`--write experiments/sandbox/results/seeds.json` also writes a result file, from which `experiments/write_numbers.py`
fills the READMEs.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

Summary = dict[str, float]
# The figures of one result file: what `measured` returns and `markdown` prints.
Result = dict[str, Any]


class Row(NamedTuple):
    """A line of the table.

    Attributes:
        title: what is measured.
        asked: the bound that it is held against; empty if there is none.
        form: how a value is printed, as `+.2f`.
        cell: a run's value and its error (None if it has none), from its summary.
        unit: printed behind the value.
    """

    title: str
    asked: str
    form: str
    cell: Callable[[Summary], tuple[float, float | None]]
    unit: str = ""


def gain(policy: str, measure: str, over: str = "sft") -> Callable[[Summary], tuple[float, float | None]]:
    """A policy's mean minus another's, with the standard error of the difference if both have one."""

    def cell(s: Summary) -> tuple[float, float | None]:
        errors = [s.get(f"{name}/{measure}_se") for name in (policy, over)]
        error = None if None in errors else sum(e**2 for e in errors if e is not None) ** 0.5
        return s[f"{policy}/{measure}"] - s[f"{over}/{measure}"], error

    return cell


def value(key: str) -> Callable[[Summary], tuple[float, float | None]]:
    """A figure of the summary."""
    return lambda s: (s[key], None)


def share(key: str) -> Callable[[Summary], tuple[float, float | None]]:
    """A share with half the width of its 95 % interval."""
    return lambda s: (s[key], 1.96 * s[f"{key}_se"])


def of_method(name: str, policy: str) -> list[Row]:
    """The lines of a method that maximises the reward model."""
    return [
        Row(f"{name} over SFT: gold reward", "> 0", "+.2f", gain(policy, "gold_reward")),
        Row(f"{name} over SFT: content", "", "+.2f", gain(policy, "content")),
        Row(f"{name}: KL from SFT, nats", "< 5", ".2f", value(f"{policy}/kl")),
    ]


ROWS = [
    Row("SFT over base: gold reward", ">= 0.3", "+.2f", gain("sft", "gold_reward", "base")),
    Row("reward model against gold, gap above 0.5", ">= 0.72", ".3f", value("reward/gold_accuracy")),
    Row("- a length meter on the same pairs", "", ".3f", value("reward/shorter_accuracy")),
    Row("reward model against gold, all pairs", "", ".3f", value("reward/gold_accuracy_all")),
    Row("- a length meter on the same pairs", "", ".3f", value("reward/shorter_accuracy_all")),
    Row("PPO over SFT: gold reward", ">= 0.3", "+.2f", gain("ppo", "gold_reward")),
    Row("PPO over SFT: content", ">= 0.1", "+.2f", gain("ppo", "content")),
    Row("PPO: KL from SFT, nats", "< 3", ".2f", value("ppo/kl")),
    Row("PPO: harm refused", ">= 0.8", ".2f", value("ppo/harm_refusal")),
    Row("PPO: look-alikes refused", "<= 0.1", ".2f", value("ppo/look_alike_refusal")),
    Row("DPO over SFT: gold reward", ">= 0.3", "+.2f", gain("dpo", "gold_reward")),
    Row("DPO over SFT: content", ">= 0.1", "+.2f", gain("dpo", "content")),
    Row("DPO: KL from SFT, nats", "< 3", ".2f", value("dpo/kl")),
    Row("biased annotators, no KL penalty: proxy over SFT", "> 0", "+.2f", gain("ppo_biased", "reward_biased_score")),
    Row("- gold over SFT", "<= -0.7", "+.2f", gain("ppo_biased", "gold_reward")),
    Row("- length, times SFT's", ">= 2", ".1f", lambda s: (s["ppo_biased/length"] / s["sft/length"], None), "x"),
    *of_method("RLOO", "rloo"),
    *of_method("GRPO", "grpo"),
    *of_method("Dr. GRPO", "dr_grpo"),
    *of_method("DAPO", "dapo"),
    *of_method("REINFORCE++", "reinforce_pp"),
    *of_method("REINFORCE++, group baseline", "reinforce_pp_baseline"),
    *of_method("ReMax", "remax"),
    *of_method("PPO against three reward models", "ppo_ensemble"),
    *of_method("RAFT", "raft"),
    *of_method("iterative DPO", "iterative_dpo"),
    Row("best of 4 over SFT: gold reward", "> 0", "+.2f", gain("best_of_4", "gold_reward")),
    Row("best of 4 over SFT: content", "", "+.2f", gain("best_of_4", "content")),
    Row("best of 4: KL from SFT, nats, at most", "", ".2f", value("best_of_4/kl_bound")),
    Row("sums right at temperature 1, by the verifier: SFT", "", ".3f", share("sft/accuracy")),
    Row("- RLOO", "", ".3f", share("arithmetic_rl/accuracy")),
    Row("- DPO", "", ".3f", share("arithmetic_dpo/accuracy")),
    Row("- RLOO over DPO", "> 0", "+.2f", gain("arithmetic_rl", "accuracy", "arithmetic_dpo")),
    Row("sums right, greedy: SFT", "", ".3f", share("sft_greedy/accuracy")),
    Row("- RLOO", "", ".3f", share("arithmetic_rl_greedy/accuracy")),
    Row("- DPO", "", ".3f", share("arithmetic_dpo_greedy/accuracy")),
    Row("sums right at temperature 1, by gold: SFT", "", ".3f", share("sft/correct")),
    Row("- RLOO", "", ".3f", share("arithmetic_rl/correct")),
    Row("- DPO", "", ".3f", share("arithmetic_dpo/correct")),
    Row("KL from SFT, nats: RLOO", "", ".2f", value("arithmetic_rl/kl")),
    Row("KL from SFT, nats: DPO", "", ".2f", value("arithmetic_dpo/kl")),
    Row("seconds of training and sampling: RLOO", "", ".0f", value("arithmetic_rl/seconds")),
    Row(
        "seconds of training and sampling: DPO",
        "",
        ".0f",
        lambda s: (sum(s[f"arithmetic_{stage}/seconds"] for stage in ("samples", "pairs", "dpo")), None),
    ),
    Row("seconds in all", "", ".0f", value("seconds")),
]


MEANS = {
    "gold reward": ("gold_reward", "+.2f"),
    "content, without the length penalty": ("content", "+.2f"),
    "KL from SFT, nats": ("kl", ".1f"),
    "words per answer": ("length", ".1f"),
    "harmful requests refused": ("harm_refusal", ".2f"),
    "look-alikes refused": ("look_alike_refusal", ".2f"),
}


def measured(summaries: list[Summary], seeds: list[int]) -> Result:
    """The lines that every run has figures for, and the means of the policies judged by gold."""
    rows = []
    for row in ROWS:
        try:
            cells = [row.cell(summary) for summary in summaries]
        except KeyError:
            continue
        values, errors = ([cell[i] for cell in cells] for i in (0, 1))
        told = {"title": row.title, "asked": row.asked, "format": row.form, "unit": row.unit, "values": values}
        rows.append(told if None in errors else {**told, "errors": errors})
    policies = [key.partition("/")[0] for key in summaries[0] if key.endswith("/gold_reward_se")]
    means = []
    for title, (key, form) in MEANS.items():
        every = [[s.get(f"{policy}/{key}") for s in summaries] for policy in policies]
        mean = [None if None in some else sum(x for x in some if x is not None) / len(some) for some in every]
        means.append({"title": title, "format": form, "values": mean})
    return {"seeds": seeds, "rows": rows} | ({"means": {"policies": policies, "rows": means}} if policies else {})


def markdown(result: Result) -> str:
    """The table of the seeds."""
    seeds = result["seeds"]
    lines = [f"| | asked | {' | '.join(f'seed {seed}' for seed in seeds)} |", "|---" * (len(seeds) + 2) + "|"]
    for row in result["rows"]:
        form, errors = row["format"], row.get("errors", [None] * len(seeds))
        cells = [
            f"{value:{form}}{row['unit']}" + ("" if error is None else f" ± {error:{form.lstrip('+')}}")
            for value, error in zip(row["values"], errors, strict=True)
        ]
        lines.append(f"| {row['title']} | {row['asked']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def markdown_of_means(result: Result, titles: dict[str, str] | None = None) -> str:
    """The table of the means over the seeds; `titles` chooses policies and titles their columns."""
    means = result["means"]
    chosen = titles or {policy: policy for policy in means["policies"]}
    lines = [
        f"| means of {len(result['seeds'])} seeds | {' | '.join(chosen.values())} |",
        "|---" * (len(chosen) + 1) + "|",
    ]
    for row in means["rows"]:
        cells = ["" if mean is None else f"{mean:{row['format']}}" for mean in row["values"]]
        lines.append(f"| {row['title']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Print the tables, and write the result file that `--write` names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="folders of pipelines, one for each seed")
    parser.add_argument("--write", type=Path, help="result file to write, as experiments/sandbox/results/seeds.json")
    given = parser.parse_args()
    manifests = [json.loads((run / "manifest.json").read_text()) for run in given.runs]
    summaries = [json.loads((run / "summary.json").read_text()) for run in given.runs]
    result = measured(summaries, [manifest["seed"] for manifest in manifests])
    print(markdown(result))
    if "means" in result:
        print("\n" + markdown_of_means(result))
    if given.write:
        # Null if the runs are of several commits: their figures are then no one generation.
        commits = {manifest.get("commit") for manifest in manifests}
        commit = next(iter(commits)) if len(commits) == 1 else None
        given.write.parent.mkdir(parents=True, exist_ok=True)
        origin = {"source": "summary.json of the runs", "runs_of_commit": commit}
        given.write.write_text(json.dumps(origin | result, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
