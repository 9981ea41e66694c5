"""Policies side by side: what they say, how far they have moved, and how sure that is."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from support.rollouts import rollout
from support.runs import write_rows
from support.tiny import tiny_folder
from transformers import AutoModelForCausalLM

from lit_align import FunctionReward, PromptDataModule, Sampling, Source
from lit_align.evaluation.compare import ComparePolicies, _gain
from lit_align.evaluation.policies import Policy, sequence_kl

ANSWERS = [("a?", "bee", True), ("b?", "sea dee eff", True), ("c?", "gee", False), ("d?", "", True)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    return {name: tiny_folder(folder / name, seed=seed) for seed, name in enumerate(("one", "two"))}


@pytest.fixture
def data(folders: dict[str, str], tmp_path: Path) -> PromptDataModule:
    write_rows(tmp_path)
    rows = [Source(str(tmp_path / "demos.json"))]
    nothing = [Source(str(tmp_path / "nowhere.json"))]  # the validation prompts are used, and no others
    return PromptDataModule(folders["one"], [], val=rows, predict=nothing, cache_dir="none", batch_size=3)


def test_log_probabilities_of_answers(folders: dict[str, str]) -> None:
    policy = Policy(folders["one"])
    answers = rollout(policy.tokenizer, ANSWERS)
    model = AutoModelForCausalLM.from_pretrained(folders["one"], dtype=torch.float32)
    expected = []
    for prompt, completion in zip(answers.prompts, answers.completions, strict=True):
        ids = torch.tensor([prompt.tolist() + completion.tokens])
        with torch.no_grad():
            logps = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        expected.append(logps[len(prompt) - 1 :].sum().item())
    for batch_size in (1, 3, 128):
        assert policy.logps(answers, batch_size).tolist() == pytest.approx(expected, abs=1e-4)
    # Several answers to a prompt stay together, whatever the batch.
    twice = rollout(policy.tokenizer, [answer for answer in ANSWERS for _ in range(2)], samples=2)
    for batch_size in (1, 3, 128):
        assert policy.logps(twice, batch_size).tolist() == pytest.approx(
            [x for x in expected for _ in range(2)], abs=1e-4
        )
    assert not policy.model.training
    assert not any(parameter.requires_grad for parameter in policy.model.parameters())


def test_a_policy_has_not_moved_from_itself(folders: dict[str, str]) -> None:
    one, two = Policy(folders["one"]), Policy(folders["two"])
    answers = rollout(one.tokenizer, ANSWERS)
    assert sequence_kl(one, one, answers).tolist() == [0.0] * 4
    assert torch.equal(sequence_kl(one, two, answers), one.logps(answers) - two.logps(answers))
    assert sequence_kl(one, two, answers).abs().min() > 0


def test_answers_are_a_function_of_the_seed(folders: dict[str, str]) -> None:
    policy = Policy(folders["one"])
    prompts = [torch.tensor([1, 20, 30]), torch.tensor([1, 40])]
    rows: list[dict[str, Any]] = [{"n": 0}, {"n": 1}]
    sampling = Sampling(max_new_tokens=6, samples=2)
    first, again, other = (policy.answer(prompts, rows, sampling, seed) for seed in (0, 0, 1))
    assert first.completions == again.completions
    assert first.completions != other.completions
    assert [row["n"] for row in first.rows] == [0, 0, 1, 1]
    assert [len(prompt) for prompt in first.prompts] == [3, 3, 2, 2]
    assert first.num_sequences == 4
    assert all(text == text.strip() for text in first.texts)


def test_stop_tokens_are_no_text(folders: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    policy = Policy(folders["one"])
    (said,) = rollout(policy.tokenizer, [("a?", " bee ", True)]).completions
    assert said.tokens[-1] == policy.tokenizer.eos_token_id
    monkeypatch.setattr("lit_align.evaluation.policies.TransformersEngine", lambda: lambda *_: [[said]])
    assert policy.answer([torch.tensor([1])], [{}], Sampling(), 0).texts == ["bee"]


def test_the_comparison(folders: dict[str, str], data: PromptDataModule, tmp_path: Path) -> None:
    def length(rows: list[dict], completions: list[str]) -> list[float]:
        return [float(len(text)) for text in completions]

    rewards: Any = {"length": FunctionReward(length)}
    step = ComparePolicies(folders, "one", data, rewards, Sampling(max_new_tokens=5, samples=2), seed=3)
    figures = step.run(tmp_path / "out")
    lines = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    assert [line["policy"] for line in lines] == ["one"] * 16 + ["two"] * 16
    assert {line["prompt"] for line in lines} == {f"say {text}" for text in prompts(tmp_path)}
    assert figures["prompts"] == 8
    # The reference is where KL and gains are measured from.
    assert (figures["one/kl"], figures["one/length_gain"], figures["one/length_gain_se"]) == (0.0, 0.0, 0.0)
    assert figures["two/kl"] > 0
    for name in folders:
        own = [line for line in lines if line["policy"] == name]
        assert figures[f"{name}/length"] == pytest.approx(sum(line["length"] for line in own) / 16)
        assert figures[f"{name}/finished"] == pytest.approx(sum(line["finished"] for line in own) / 16)
        assert 0 < figures[f"{name}/tokens"] <= 5
    assert figures["two/length_gain"] == pytest.approx(figures["two/length"] - figures["one/length"])
    assert step.run(tmp_path / "again") == figures
    step.seed = 4
    assert step.run(tmp_path / "other") != figures


def prompts(folder: Path) -> list[str]:
    return [row["instruction"].removeprefix("say ") for row in json.loads((folder / "demos.json").read_text())]


def test_a_reference_that_is_none_of_them(data: PromptDataModule) -> None:
    with pytest.raises(ValueError, match="reference 'three' is none of the policies: one, two"):
        ComparePolicies({"one": "a", "two": "b"}, "three", data, {})


def test_standard_errors_are_of_paired_prompts() -> None:
    values, reference = torch.tensor([3.0, 5.0, 4.0, 8.0]), torch.tensor([1.0, 3.0, 2.0, 6.0])
    gain = _gain("r", values, reference, samples=1)
    assert gain["r"] == 5.0
    assert gain["r_se"] == pytest.approx(values.std().item() / 2)
    # Prompts differ, and answers to the same prompt differ by the same: there is nothing unsure about the gain.
    assert (gain["r_gain"], gain["r_gain_se"]) == (2.0, 0.0)


def test_answers_to_one_prompt_are_not_independent() -> None:
    # Two prompts; whatever they are worth, answering each ten times tells no more about prompts than once.
    once, reference = torch.tensor([0.0, 1.0]), torch.zeros(2)
    often = _gain("r", once.repeat_interleave(10), reference.repeat_interleave(10), samples=10)
    assert often == pytest.approx(_gain("r", once, reference, samples=1))
    assert often["r_se"] == pytest.approx(math.sqrt(0.5) / math.sqrt(2))
