"""Sampled answers scored and chosen from: the right one, what is not chosen counted, and errors that say where."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny import tiny_folder
from torch import Tensor

from lit_align import (
    FunctionReward,
    InstructionDataModule,
    ModelReward,
    Network,
    NumericAnswer,
    PreferenceDataModule,
    Reward,
    Source,
)
from lit_align.data.rows import BadRow, Tally, user
from lit_align.feedback import BestOfN, BestWorstPairs
from lit_align.types import Rollout

Answers = Sequence[tuple[str, bool]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_folder(tmp_path_factory.mktemp("model"))


def scores(rows: list[dict], completions: list[str]) -> list[float]:
    """The number that an answer says."""
    return [float(text.split()[0]) if text else 0.0 for text in completions]


def write(path: Path, prompts: Sequence[Answers], **columns: Any) -> str:
    """What `lit-align predict` would have written."""
    rows = []
    for i, answers in enumerate(prompts):
        texts, finished = [text for text, _ in answers], [end for _, end in answers]
        rows.append({"prompt": user(f"say {i}"), **columns, "completions": texts, "finished": finished})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def done(*texts: str) -> Answers:
    return [(text, True) for text in texts]


PROMPTS = [
    done("1 a", "3 b", "2 c"),  # the second is best, the first worst
    [("5 a", False), ("4 b", True), ("0 c", True)],  # the best was cut
    done("2 a", "2 b", "1 c"),  # two are best
    done("2 a", "2 a", "1 c"),  # one text twice is no tie
    done("1 a", "1 b", "1 a"),  # all the same
    [("1 a", False), ("2 b", False), ("", True)],  # nothing to imitate
]


def test_the_best_of_n(model: str, tmp_path: Path) -> None:
    file = write(tmp_path / "completions.jsonl", PROMPTS, category="x", label=True)
    figures = BestOfN(file, FunctionReward(scores), model, batch_size=4).run(tmp_path / "out")
    rows = read(tmp_path / "out" / "best.jsonl")
    assert [(row["completion"], row["score"]) for row in rows] == [
        ("3 b", 3.0),
        ("4 b", 4.0),
        ("2 a", 2.0),
        ("2 a", 2.0),
        ("1 a", 1.0),
    ]
    assert rows[1] == {"prompt": user("say 1"), "category": "x", "completion": "4 b", "score": 4.0}
    assert figures == {
        "prompts": 6,
        "scored": 6,
        "all_the_same": 1,
        "ties": 2,  # of the third prompt, and of the fifth
        "written": 5,
        "all_cut_or_empty": 1,
        "score": pytest.approx((2 + 3 + 5 / 3 + 5 / 3 + 1 + 1) / 6),
        "best_score": pytest.approx((3 + 5 + 2 + 2 + 1 + 2) / 6),
        "worst_score": pytest.approx((1 + 0 + 1 + 1 + 1 + 0) / 6),
    }
    # As SFT reads them: prompt and answer, its stop token at the end.
    data = InstructionDataModule(model, [Source(str(tmp_path / "out" / "best.jsonl"))], cache_dir="none")
    row = data.encode({"prompt": user("say 1"), "completion": "4 b"}, Tally())[0]
    assert row.example.trunk.scored[-1]


def test_a_least_score(model: str, tmp_path: Path) -> None:
    file = write(tmp_path / "completions.jsonl", PROMPTS)
    figures = BestOfN(file, FunctionReward(scores), model, least=2.5).run(tmp_path / "out")
    assert [row["completion"] for row in read(tmp_path / "out" / "best.jsonl")] == ["3 b", "4 b"]
    assert figures["below_the_least_score"] == 3
    with pytest.raises(
        ValueError, match=r"completions.jsonl: nothing to train on is left of 6 prompts, .* 5 below the"
    ):
        BestOfN(file, FunctionReward(scores), model, least=9.0).run(tmp_path / "none")
    assert list((tmp_path / "none").iterdir()) == []


def test_best_and_worst(model: str, tmp_path: Path) -> None:
    file = write(tmp_path / "completions.jsonl", PROMPTS, category="x")
    figures = BestWorstPairs(file, FunctionReward(scores), model).run(tmp_path / "out")
    rows = read(tmp_path / "out" / "pairs.jsonl")
    assert [(row["chosen"], row["rejected"], row["margin"]) for row in rows] == [
        ("3 b", "1 a", 2.0),
        ("5 a", "0 c", 5.0),
        ("2 a", "1 c", 1.0),
        ("2 a", "1 c", 1.0),
        ("2 b", "", 2.0),
    ]
    assert set(rows[0]) == {"prompt", "category", "chosen", "rejected", "margin", "finished"}
    counts = {name: figures[name] for name in ("prompts", "scored", "written", "all_the_same", "ties")}
    assert counts == {"prompts": 6, "scored": 6, "written": 5, "all_the_same": 1, "ties": 1}
    # As DPO reads them: an answer that was cut has no stop token, and the margin is that of the pair.
    data = PreferenceDataModule(model, [Source(str(tmp_path / "out" / "pairs.jsonl"))], cache_dir="none")
    (_, cut), tally = list(Source(str(tmp_path / "out" / "pairs.jsonl")).read("error", _tally()))[1], _tally()
    assert cut["finished"] == [False, True]
    assert cut["margins"] == [5.0, 0.0]
    chosen, rejected = data.encode(cut, tally)[0].example.branches
    stop = data._encoder().stop_ids
    assert chosen.tokens[-1] not in stop
    assert rejected.tokens[-1] in stop


# Kills: any of the columns written beside the pair; all of them.
def test_what_was_said_of_other_answers_is_not_written(model: str, tmp_path: Path) -> None:
    said = {"share": 0.1, "score_chosen": 1.0, "score_rejected": 5.0, "rank": 1, "score": 2.0, "instruction": "Say it."}
    file = write(tmp_path / "completions.jsonl", [done("1 a", "3 b")], **said)
    BestWorstPairs(file, FunctionReward(scores), model).run(tmp_path)
    (row,) = read(tmp_path / "pairs.jsonl")
    assert set(row) == {"prompt", "instruction", "chosen", "rejected", "margin", "finished"}
    ((_, pair),) = Source(str(tmp_path / "pairs.jsonl")).read("error", _tally())
    assert pair["completions"] == ["3 b", "1 a"]
    assert pair["ranks"] == [0.0, 1.0]
    assert "scores" not in pair


def _tally() -> Any:
    from lit_align.data.rows import Tally

    return Tally()


def test_a_least_margin(model: str, tmp_path: Path) -> None:
    file = write(tmp_path / "completions.jsonl", PROMPTS)
    figures = BestWorstPairs(file, FunctionReward(scores), model, least_margin=2.0).run(tmp_path / "out")
    assert [row["margin"] for row in read(tmp_path / "out" / "pairs.jsonl")] == [2.0, 5.0, 2.0]
    assert (figures["below_the_least_margin"], figures["all_the_same"]) == (2, 1)
    # A verifier that finds all right, or all wrong, leaves no pair.
    with pytest.raises(ValueError, match="nothing to train on is left of 6 prompts, 6 scored, 6 all the same"):
        BestWorstPairs(file, FunctionReward(lambda rows, texts: [1.0] * len(texts)), model).run(tmp_path / "none")


def test_batches_do_not_matter(model: str, tmp_path: Path) -> None:
    """Nor that prompts have different numbers of answers; the model sees what it would in training."""
    torch.manual_seed(0)
    from transformers import AutoModelForSequenceClassification

    scorer = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1)
    scorer.save_pretrained(tmp_path / "reward")
    for name in Path(model).glob("*token*"):
        (tmp_path / "reward" / name.name).write_bytes(name.read_bytes())
    prompts = [PROMPTS[0], PROMPTS[1], PROMPTS[0][:2], PROMPTS[2]]
    file = write(tmp_path / "completions.jsonl", prompts)
    written = []
    for batch_size in (1, 5, 100):
        reward = ModelReward(Network(str(tmp_path / "reward")))
        BestWorstPairs(file, reward, model, batch_size=batch_size, device="cpu").run(tmp_path / str(batch_size))
        written.append(read(tmp_path / str(batch_size) / "pairs.jsonl"))
    for rows in written[1:]:
        for row, other in zip(rows, written[0], strict=True):
            assert row.pop("margin") == pytest.approx(other["margin"], abs=1e-5)
            assert row == {name: value for name, value in other.items() if name != "margin"}


class Strange(Reward):
    """Gives what it is told for answers that say so."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def forward(self, rollout: Rollout) -> Tensor:
        return torch.tensor([self.value if "x" in text else float(len(text)) for text in rollout.texts])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_score_that_is_no_number(model: str, tmp_path: Path, value: float) -> None:
    """Found among the others of its batch."""
    file = write(tmp_path / "completions.jsonl", [done("a", "bb"), done("a", "x"), done("ccc", "a")])
    problem = rf"completions.jsonl, row 2: Strange returned {value} for 1 of 2 completions; the prompts: 'say 1'"
    with pytest.raises(BadRow, match=problem) as caught:
        BestOfN(file, Strange(value), model).run(tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out" / "best.jsonl").exists()
    figures = BestOfN(file, Strange(value), model, on_bad_row="skip").run(tmp_path / "out")
    assert (figures["prompts"], figures["scored"], figures["skipped"], figures["written"]) == (3, 2, 1, 2)
    assert [row["completion"] for row in read(tmp_path / "out" / "best.jsonl")] == ["bb", "ccc"]


def test_a_column_that_the_verifier_misses(model: str, tmp_path: Path) -> None:
    file = tmp_path / "completions.jsonl"
    rows = [{"prompt": "2 + 2", "reference": "4"}, {"prompt": "1 + 1"}]
    file.write_text("".join(json.dumps({**row, "completions": ["#### 4", "#### 2"]}) + "\n" for row in rows))
    problem = "completions.jsonl, row 2: NumericAnswer needs the column 'reference'; the row has prompt "
    with pytest.raises(BadRow, match=problem):
        BestOfN(str(file), NumericAnswer(), model).run(tmp_path / "out")
    BestOfN(str(file), NumericAnswer(), model, on_bad_row="skip", least=1.0).run(tmp_path / "out")
    # Without `finished` an answer is whole.
    best = {"prompt": "2 + 2", "reference": "4", "completion": "#### 4", "score": 1.0}
    assert read(tmp_path / "out" / "best.jsonl") == [best]


GOOD = {"prompt": user("a"), "completions": ["b", "c"], "finished": [True, True]}
BAD = [
    ({"completions": None}, "field 'completions' is NoneType, expected a list"),
    ({"completions": ...}, "field 'completions' is missing; the row has 'prompt', 'finished'"),
    ({"completions": []}, "field 'completions' is an empty list"),
    ({"completions": ["b", 3]}, "field 'completions[1]' is int (3), expected text"),
    ({"prompt": ...}, "field 'prompt' is missing; the row has 'completions', 'finished'"),
    ({"prompt": [{"role": "assistant", "content": "a"}]}, "field 'prompt' ends with an assistant turn"),
    ({"finished": [True]}, "field 'finished' is [True], expected true or false for each of 2 completions"),
    ({"finished": [True, 1]}, "field 'finished' is [True, 1], expected true or false for each of 2 completions"),
]


@pytest.mark.parametrize(("changes", "problem"), BAD, ids=lambda value: str(value)[:50])
def test_a_row_that_does_not_fit(model: str, tmp_path: Path, changes: dict, problem: str) -> None:
    file = tmp_path / "completions.jsonl"
    bad = {name: value for name, value in {**GOOD, **changes}.items() if value is not ...}
    file.write_text(f"{json.dumps(GOOD)}\n{json.dumps(bad)}\n")
    with pytest.raises(BadRow) as caught:
        BestOfN(str(file), FunctionReward(lambda rows, texts: [1.0] * len(texts)), model).run(tmp_path / "out")
    assert str(caught.value).startswith(f"{file}, row 2: {problem}")
    assert "\n" not in str(caught.value)


def test_a_file_that_is_broken_or_not_there(model: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no file matches"):
        BestOfN(str(tmp_path / "none.jsonl"), Strange(1.0), model).run(tmp_path / "out")
    (tmp_path / "completions.jsonl").write_text(json.dumps(GOOD) + "\n{\n")
    with pytest.raises(BadRow, match=r"completions\.jsonl, row 2: not valid json"):
        BestOfN(str(tmp_path / "completions.jsonl"), Strange(1.0), model).run(tmp_path / "out")
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        BestOfN("x", Strange(1.0), model, batch_size=0)


def test_a_reward_that_gives_the_wrong_number_of_scores(model: str, tmp_path: Path) -> None:
    file = write(tmp_path / "completions.jsonl", PROMPTS)
    with pytest.raises(BadRow, match=r"row 1: the reward function <lambda> returned \(2,\) scores for 3 completions"):
        BestOfN(file, FunctionReward(lambda rows, texts: [1.0, 2.0]), model).run(tmp_path / "out")
