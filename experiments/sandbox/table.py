"""Runs of several seeds side by side, as Markdown: `python experiments/sandbox/table.py runs/seed-101 ...`."""

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
    ("seconds in all", "<= 600", value("seconds", 0)),
]


def main() -> None:
    """Print the table."""
    folders = [Path(argument) for argument in sys.argv[1:]]
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in folders]
    seeds = [json.loads((folder / "manifest.json").read_text())["seed"] for folder in folders]
    print(f"| | asked | {' | '.join(f'seed {seed}' for seed in seeds)} |")
    print("|---" * (len(seeds) + 2) + "|")
    for title, asked, cell in ROWS:
        print(f"| {title} | {asked} | {' | '.join(cell(summary) for summary in summaries)} |")


if __name__ == "__main__":
    main()
