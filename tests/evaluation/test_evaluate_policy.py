from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.tiny import tiny_folder

from lit_align.cli import main
from lit_align.data.rows import Tally
from lit_align.evaluation.evaluate_policy import EvaluatePolicy
from lit_align.evaluation.policies import Policy
from lit_align.evaluation.policy_answers import PolicyAnswers
from lit_align.models.network import Network
from lit_align.rewards import FunctionReward
from lit_align.rollout import Sampling


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("policies")
    return {name: tiny_folder(root / name, seed=seed) for seed, name in enumerate(("one", "two"))}


@pytest.fixture
def data(tmp_path: Path) -> dict[str, str]:
    def written(name: str, rows: list[dict[str, Any]]) -> str:
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(tmp_path / name)

    choices = [{"question": f"q{i}", "A": "w", "B": "x", "C": "y", "D": "z", "answer": "ABCD"[i % 4]} for i in range(8)]
    (tmp_path / "text.txt").write_text("one two three\n\nfour five six seven\n")
    return {
        "prompts": written("prompts.jsonl", [{"prompt": f"say {i}", "label": "ab"[i % 2]} for i in range(6)]),
        "questions": written("choices.jsonl", choices),
        "text": str(tmp_path / "text.txt"),
    }


def length(rows: list[dict], completions: list[str]) -> list[float]:
    return [float(len(text)) for text in completions]


def step(folders: dict[str, str], data: dict[str, str], **further: Any) -> EvaluatePolicy:
    options = {"reference": Network(folders["two"]), "reward": FunctionReward(length), "category": "label"}
    options |= {"sampling": Sampling(max_new_tokens=5, samples=4, batch_size=8), "resamples": 30}
    return EvaluatePolicy(Network(folders["one"]), **{**data, **options, **further})


def test_every_part(folders: dict[str, str], data: dict[str, str], tmp_path: Path) -> None:
    figures = step(folders, data).run(tmp_path / "out")
    told = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert (told["policy"]["prompts"], told["policy"]["answers"]) == (6, 24)
    assert set(told["policy"]["refusals"]) == {"a", "b"}
    assert figures["policy/text_loss"] > 3
    assert 0 <= figures["policy/calibration/ece_10"] <= 1
    assert figures["against_reference/kl"] > 0
    won = figures["against_reference/reward_win_rate/win_rate"]
    assert figures["against_reference/reward_win_rate/flips"] == 0
    assert 0 <= won <= 1
    assert figures["against_reference/planted_judges/order_only/first_shown_wins"] == 1.0
    assert [point["n"] for point in told["policy"]["best_of_n"]["points"]] == [1, 2, 4]
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("<svg") == 3
    # The same again, from what is kept and from nothing.
    assert step(folders, data).run(tmp_path / "out") == figures
    assert step(folders, data).run(tmp_path / "again") == figures
    assert step(folders, data, seed=1).run(tmp_path / "other") != figures


def test_a_policy_against_itself(folders: dict[str, str], data: dict[str, str], tmp_path: Path) -> None:
    figures = step(folders, data, reference=Network(folders["one"])).run(tmp_path / "out")
    assert figures["against_reference/reward_win_rate/ties"] == 1.0
    assert figures["against_reference/kl"] == 0.0


def test_a_reward_that_gives_no_number_is_named(folders: dict[str, str], data: dict[str, str], tmp_path: Path) -> None:
    def some(rows: list[dict], completions: list[str]) -> list[float]:
        return [float("nan") if row["prompt"] == "say 2" else 1.0 for row in rows]

    step(folders, data, reward=FunctionReward(some)).run(tmp_path / "out")
    notes = json.loads((tmp_path / "out" / "evaluation.json").read_text())["notes"]
    assert any("reward: 1 of 6 prompts have no score" in note and "'say 2'" in note for note in notes)


def test_choices_are_log_probabilities(folders: dict[str, str], data: dict[str, str], tmp_path: Path) -> None:
    answers = PolicyAnswers(folders["one"], tmp_path, "policy")
    rows = [{"prompt": [{"role": "user", "content": "q"}], "completions": ["A", "BC"], "ranks": [0, 1]}]
    (found,) = answers.choices(rows, Tally(), {})
    model = Policy(folders["one"]).model.hf
    ids = answers.encoder.prompt(rows[0]["prompt"])
    for text, value in zip(("A", "BC"), found, strict=True):
        said = list(answers.encoder.answer(rows[0]["prompt"], text, finished=False).tokens)
        logits = model(torch.tensor([[*ids, *said]])).logits[0].log_softmax(-1)
        expected = sum(logits[len(ids) - 1 + k, token].item() for k, token in enumerate(said))
        assert value == pytest.approx(expected, abs=1e-3)
    assert np.isfinite(found).all()


def test_what_cannot_be_measured(folders: dict[str, str], data: dict[str, str], tmp_path: Path) -> None:
    out = ["--out", str(tmp_path / "out")]
    for args, message in (
        ([folders["one"], data["prompts"], "--category", "kind"], "field 'kind' is missing"),
        ([folders["one"], data["prompts"], "--questions", data["prompts"]], "holds no multiple choice"),
        ([str(tmp_path / "none"), data["prompts"]], "none"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            main(["evaluate", "policy", *args, *out, "--sampling.max_new_tokens", "3", "--limit", "3"])
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="needs prompts, questions or text"):
        EvaluatePolicy(Network(folders["one"]))
