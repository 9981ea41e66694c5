"""The sandbox's other pipelines, shrunken: every method on one reward model, and sums by a verifier."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from lit_align.cli.commands import experiments
from lit_align.cli.entry import main

METHODS = ("sft", "ppo", "rloo", "grpo", "raft", "dpo", "iterative_dpo")


def run(name: str, out: Path) -> dict[str, float]:
    summary = main(["pipeline", str(experiments() / "sandbox" / f"{name}.yaml"), "--quick", "--out", str(out)])
    # Of a handful of held-out pairs an interval may not exist.
    assert all(math.isfinite(value) for key, value in summary.items() if not key.endswith(("_low", "_high")))
    return summary


@pytest.mark.slow
def test_every_method_on_one_reward_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIT_ALIGN_CACHE", str(tmp_path / "cache"))
    summary = run("estimators", tmp_path / "out")
    for measure in ("gold_reward", "content", "kl", "length", "harm_refusal"):
        assert {f"{method}/{measure}" for method in METHODS} <= set(summary)
    assert {f"best_of_4/{measure}" for measure in ("gold_reward", "kl_bound")} <= set(summary)
    for number in (1, 2, 3):
        # What was sampled was scored, and what was not written is counted.
        best = {
            name: summary.get(f"raft_{number}_best/{name}", 0) for name in ("scored", "written", "all_cut_or_empty")
        }
        pairs = {
            name: summary[f"iterative_dpo_{number}_pairs/{name}"] for name in ("scored", "written", "all_the_same")
        }
        assert best["scored"] == best["written"] + best["all_cut_or_empty"] == 64
        assert pairs["scored"] == pairs["written"] + pairs["all_the_same"] == 64
    again = main(
        ["pipeline", str(experiments() / "sandbox" / "estimators.yaml"), "--quick", "--out", str(tmp_path / "out")]
    )
    assert again["seconds_this_time"] < 5


@pytest.mark.slow
def test_sums_by_a_verifier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIT_ALIGN_CACHE", str(tmp_path / "cache"))
    summary = run("arithmetic", tmp_path / "out")
    for policy in ("sft", "arithmetic_rl", "arithmetic_dpo"):
        for name in (f"{policy}/accuracy", f"{policy}_greedy/accuracy", f"{policy}/correct"):
            assert 0 <= summary[name] <= 1
            assert summary[f"{name}_se"] >= 0
    lines = (tmp_path / "out" / "arithmetic_pairs" / "pairs.jsonl").read_text().splitlines()
    pairs = [json.loads(line) for line in lines]
    assert {pair["margin"] for pair in pairs} == {1.0}
    assert {pair["category"] for pair in pairs} == {"arithmetic"}
