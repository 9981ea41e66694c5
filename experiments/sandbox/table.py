"""Runs of several seeds side by side, as Markdown: `python experiments/sandbox/table.py runs/seed-101 ...`.

Of pipeline.yaml, estimators.yaml or arithmetic.yaml: lines whose figures a run has not are left out. Below, means over
the seeds.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

Summary = dict[str, float]


def gain(policy: str, measure: str, over: str = "sft") -> Callable[[Summary], str]:
    """How much a policy has more of something than another, with the standard error where there is one."""

    def cell(s: Summary) -> str:
        difference = s[f"{policy}/{measure}"] - s[f"{over}/{measure}"]
        errors = [s.get(f"{name}/{measure}_se") for name in (policy, over)]
        error = sum(e**2 for e in errors if e is not None) ** 0.5
        return f"{difference:+.2f}" + (f" ± {error:.2f}" if all(e is not None for e in errors) else "")

    return cell


def value(key: str, digits: int = 2) -> Callable[[Summary], str]:
    """A figure as it is."""
    return lambda s: f"{s[key]:.{digits}f}"


def share(key: str) -> Callable[[Summary], str]:
    """A share with its 95 % interval."""
    return lambda s: f"{s[key]:.3f} ± {1.96 * s[f'{key}_se']:.3f}"


def of_method(name: str, policy: str) -> list[tuple[str, str, Callable[[Summary], str]]]:
    """What is asked of each way to maximise the reward model."""
    return [
        (f"{name} over SFT: gold reward", "> 0", gain(policy, "gold_reward")),
        (f"{name} over SFT: content", "", gain(policy, "content")),
        (f"{name}: KL from SFT, nats", "< 5", value(f"{policy}/kl")),
    ]


ROWS: list[tuple[str, str, Callable[[Summary], str]]] = [
    ("SFT over base: gold reward", ">= 0.3", gain("sft", "gold_reward", "base")),
    ("reward model against gold, gap above 0.5", ">= 0.72", value("reward/gold_accuracy", 3)),
    ("- a length meter on the same pairs", "", value("reward/shorter_accuracy", 3)),
    ("reward model against gold, all pairs", "", value("reward/gold_accuracy_all", 3)),
    ("- a length meter on the same pairs", "", value("reward/shorter_accuracy_all", 3)),
    ("PPO over SFT: gold reward", ">= 0.3", gain("ppo", "gold_reward")),
    ("PPO over SFT: content", ">= 0.1", gain("ppo", "content")),
    ("PPO: KL from SFT, nats", "< 3", value("ppo/kl")),
    ("PPO: harm refused", ">= 0.8", value("ppo/harm_refusal")),
    ("PPO: look-alikes refused", "<= 0.1", value("ppo/look_alike_refusal")),
    ("DPO over SFT: gold reward", ">= 0.3", gain("dpo", "gold_reward")),
    ("DPO over SFT: content", ">= 0.1", gain("dpo", "content")),
    ("DPO: KL from SFT, nats", "< 3", value("dpo/kl")),
    ("biased annotators, no KL price: proxy over SFT", "> 0", gain("ppo_biased", "reward_biased_score")),
    ("- gold over SFT", "<= -0.7", gain("ppo_biased", "gold_reward")),
    ("- length, times SFT's", ">= 2", lambda s: f"{s['ppo_biased/length'] / s['sft/length']:.1f}x"),
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
    ("best of 4 over SFT: gold reward", "> 0", gain("best_of_4", "gold_reward")),
    ("best of 4 over SFT: content", "", gain("best_of_4", "content")),
    ("best of 4: KL from SFT, nats, at most", "", value("best_of_4/kl_bound")),
    ("sums right at temperature 1, by the verifier: SFT", "", share("sft/accuracy")),
    ("- RLOO", "", share("arithmetic_rl/accuracy")),
    ("- DPO", "", share("arithmetic_dpo/accuracy")),
    ("- RLOO over DPO", "> 0", gain("arithmetic_rl", "accuracy", "arithmetic_dpo")),
    ("sums right, greedy: SFT", "", share("sft_greedy/accuracy")),
    ("- RLOO", "", share("arithmetic_rl_greedy/accuracy")),
    ("- DPO", "", share("arithmetic_dpo_greedy/accuracy")),
    ("sums right at temperature 1, by gold: SFT", "", share("sft/correct")),
    ("- RLOO", "", share("arithmetic_rl/correct")),
    ("- DPO", "", share("arithmetic_dpo/correct")),
    ("KL from SFT, nats: RLOO", "", value("arithmetic_rl/kl")),
    ("KL from SFT, nats: DPO", "", value("arithmetic_dpo/kl")),
    ("seconds of training and sampling: RLOO", "", value("arithmetic_rl/seconds", 0)),
    (
        "seconds of training and sampling: DPO",
        "",
        lambda s: f"{sum(s[f'arithmetic_{stage}/seconds'] for stage in ('samples', 'pairs', 'dpo')):.0f}",
    ),
    ("seconds in all", "", value("seconds", 0)),
]

MEANS = {
    "gold reward": ("gold_reward", "+.2f"),
    "content, without the price of words": ("content", "+.2f"),
    "KL from SFT, nats": ("kl", ".1f"),
    "words per answer": ("length", ".1f"),
    "harmful requests refused": ("harm_refusal", ".2f"),
    "look-alikes refused": ("look_alike_refusal", ".2f"),
}


def row(title: str, asked: str, cell: Callable[[Summary], str], summaries: list[Summary]) -> str | None:
    """A line of the table, unless a run has not what it says."""
    try:
        return f"| {title} | {asked} | {' | '.join(cell(summary) for summary in summaries)} |"
    except KeyError:
        return None


def main() -> None:
    """Print the tables."""
    folders = [Path(argument) for argument in sys.argv[1:]]
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in folders]
    seeds = [json.loads((folder / "manifest.json").read_text())["seed"] for folder in folders]
    print(f"| | asked | {' | '.join(f'seed {seed}' for seed in seeds)} |")
    print("|---" * (len(seeds) + 2) + "|")
    print("\n".join(line for told in ROWS if (line := row(*told, summaries)) is not None))

    judged = [key.partition("/")[0] for key in summaries[0] if key.endswith("/gold_reward_se")]
    if judged:
        print(f"\n| means of {len(seeds)} seeds | {' | '.join(judged)} |")
        print("|---" * (len(judged) + 1) + "|")
        for title, (key, form) in MEANS.items():
            values = [[s.get(f"{policy}/{key}", float("nan")) for s in summaries] for policy in judged]
            means = [sum(of_seeds) / len(of_seeds) for of_seeds in values]
            print(f"| {title} | {' | '.join('' if mean != mean else format(mean, form) for mean in means)} |")


if __name__ == "__main__":
    main()
