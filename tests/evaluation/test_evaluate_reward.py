from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.tiny import tiny_config
from transformers import AutoModelForSequenceClassification

from lit_align.cli import main
from lit_align.data.rows import Tally
from lit_align.data.source import Source
from lit_align.evaluation.comparisons import read_comparisons
from lit_align.evaluation.evaluate_reward import EvaluateReward
from lit_align.evaluation.ledger import Ledger
from lit_align.evaluation.reward_scores import RewardScores
from lit_align.models.network import Network
from lit_align.models.scratch import bpe_tokenizer


@pytest.fixture(scope="module")
def reward(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("reward")
    torch.manual_seed(0)
    config = tiny_config("llama", num_labels=1)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    bpe_tokenizer([], 263).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def pairs(tmp_path: Path) -> str:
    rng = np.random.default_rng(0)
    rows = [
        {"prompt": f"say {n // 2}", "chosen": "a" * int(rng.integers(1, 30)), "rejected": "b" * 9, "kind": str(n % 3)}
        for n in range(24)
    ]
    rows[3]["chosen"] = ""
    rows.append({"prompt": "bad", "chosen": None, "rejected": "x", "kind": "0"})
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def told(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "evaluation.json").read_text())


def test_the_command(reward: str, pairs: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    args = ["evaluate", "reward", reward, pairs, "--category", "kind", "--resamples", "50", "--second", reward]
    figures = main([*args, "--out", str(out)])
    first = told(out)
    assert figures["accuracy"] == first["accuracy"]["value"]
    assert (first["pairs"], first["prompts"], first["empty_answers"], first["rows"]["skipped"]) == (24, 12, 1, 1)
    assert set(first["by_category"]) == {"0", "1", "2"}
    assert first["second"]["agreement"]["value"] == 1.0
    shown = capsys.readouterr().out
    for text in ("longer wins", "shorter wins", "1 answers are empty", "row 25: field 'chosen' is null", "by category"):
        assert text in shown
    page = (out / "report.html").read_text()
    assert page.count("<svg") == 2
    assert "src=" not in page
    assert (out / "figures" / "reward.svg").read_text().startswith("<?xml")
    # The same numbers again: from the scores that are kept, and from none.
    assert main([*args, "--out", str(out)]) == figures
    (out / "scores.jsonl").unlink()
    assert main([*args, "--out", str(out)]) == figures
    # And from a file.
    keys = {"model": reward, "pairs": pairs, "category": "kind", "resamples": 50, "second": reward}
    (tmp_path / "card.yaml").write_text(json.dumps(keys))
    assert main(["evaluate", "reward", str(tmp_path / "card.yaml"), "--out", str(tmp_path / "other")]) == figures


def test_a_stopped_run_goes_on(reward: str, pairs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def step() -> EvaluateReward:
        return EvaluateReward(Network(reward), Source(pairs), batch_tokens=100, resamples=20)

    whole = step().run(tmp_path / "whole")
    calls: list[int] = []
    scores = RewardScores._scores

    def stops(self: RewardScores, examples: Any) -> Any:
        calls.append(len(examples))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return scores(self, examples)

    monkeypatch.setattr(RewardScores, "_scores", stops)
    with pytest.raises(KeyboardInterrupt):
        step().run(tmp_path / "out")
    with (tmp_path / "out" / "scores.jsonl").open("a") as file:
        file.write('{"item": 1, "resu')  # killed as it wrote
    calls.append(0)
    calls.append(0)
    done = sum(calls[:3])
    assert step().run(tmp_path / "out") == whole
    assert sum(calls[6:]) == 24 - done


def test_the_scores_are_those_of_transformers(reward: str, pairs: str, tmp_path: Path) -> None:
    comparisons = read_comparisons(Source(pairs), Tally())
    scorer = RewardScores(Network(reward, dtype="float64"))
    found = scorer(comparisons, Tally(), tmp_path / "scores.jsonl", {})
    model = AutoModelForSequenceClassification.from_pretrained(reward, dtype=torch.float64, num_labels=1).eval()
    encoder = scorer.encoder
    for one, of in list(zip(comparisons, found, strict=True))[:4]:
        for text, score in zip(one.texts, of, strict=True):
            ids = encoder.prompt(one.prompt) + list(encoder.answer(one.prompt, text).tokens)
            hidden = model.model(torch.tensor([ids])).last_hidden_state[0, -1]
            assert score == pytest.approx(model.score(hidden).item(), abs=1e-5)


def test_what_is_no_reward_model_or_no_pairs(reward: str, pairs: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "a"}\n')
    out = ["--out", str(tmp_path / "out")]
    for args, message in (
        (["reward", str(tmp_path / "empty"), pairs], "empty"),
        (["reward", reward, str(prompts)], "holds no comparison: expected chosen and rejected"),
        (["reward", reward, pairs, "--category", "group"], "field 'group' is missing; the row has 'prompt'"),
        (["reward", reward, str(tmp_path / "no.jsonl")], "no file matches"),
        (["reward", reward], "evaluate reward takes MODEL PAIRS or one FILE.yaml"),
        (["reward", reward, pairs, "--bins", "3"], "unknown key 'bins'"),
        (["reward", "no.yaml"], "there is no file 'no.yaml'"),
        (["rewards", reward, pairs], "evaluate 'rewards': choose one of reward, policy, data"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            main(["evaluate", *args, *out])
        assert "\n" not in str(error.value)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "report.html").write_text("mine")
    with pytest.raises(FileExistsError, match="is not a report of lit-align"):
        main(["evaluate", "reward", reward, pairs, *out])


def test_a_ledger_of_other_data_begins_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = Ledger(tmp_path / "x.jsonl", {"data": "a", "model": "m"})
    one.add({0: [1.0, float("nan")], 1: {"text": "hi"}})
    again = Ledger(tmp_path / "x.jsonl", {"data": "a", "model": "m"})
    assert again.done[1] == {"text": "hi"}
    assert np.isnan(again.done[0][1])
    assert list(again.remaining([[0, 1], [2]], "x", "y")) == [[2]]
    assert Ledger(tmp_path / "x.jsonl", {"data": "b", "model": "m"}).done == {}
    assert "results of another data: begun anew" in capsys.readouterr().out
