"""A list that is given again replaces the one before it, wherever it is given."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.parsers import only

from lit_align.cli.entry import main

DATA = "lit_align.InstructionDataModule"
LENGTH = "lit_align.LengthReward"
CSV = "lightning.pytorch.loggers.CSVLogger"
STOP = "lightning.pytorch.callbacks.EarlyStopping"

FIRST: dict[str, Any] = {
    "model": {
        "class_path": "lit_align.PPOModule",
        "init_args": {
            "network": {"name": "m"},
            "reward": {
                "class_path": "lit_align.SumReward",
                "init_args": {"rewards": [{"class_path": LENGTH, "init_args": {"target": 10, "shape": "below"}}]},
            },
        },
    },
    "data": {
        "class_path": "lit_align.PromptDataModule",
        "init_args": {
            "tokenizer": "m",
            "train": [{"hub": "a/b", "limit": 7, "format": "alpaca", "columns": {"prompt": "x"}}],
            "val": [{"path": "a.json"}, {"path": "b.json", "limit": 3}],
        },
    },
    "trainer": {
        "callbacks": [{"class_path": STOP, "init_args": {"monitor": "val/loss", "patience": 9}}],
        "logger": {"class_path": CSV, "init_args": {"save_dir": "x", "name": "own"}},
    },
}


@pytest.fixture
def parsed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> Callable[..., dict[str, Any]]:
    """The configuration of the first file and of what comes after it: files of these contents, or arguments."""

    only("fit", monkeypatch)

    def parsed(*further: Any) -> dict[str, Any]:
        words = []
        for number, given in enumerate((FIRST, *further)):
            if isinstance(given, str):
                words.append(given)
                continue
            file = tmp_path / f"{number}.yaml"
            file.write_text(yaml.safe_dump(given))
            words += ["-c", str(file)]
        with pytest.raises(SystemExit):
            main(["fit", *words, "--print_config"])
        return yaml.safe_load(capsys.readouterr().out)

    return parsed


def sources(config: dict[str, Any], part: str = "train") -> list[dict[str, Any]]:
    """What each source says beyond the defaults."""
    keys = ("path", "hub", "limit", "columns")
    return [{key: source[key] for key in keys if source[key]} for source in config["data"]["init_args"][part]]


MINE = [{"path": "mine.jsonl"}]
AGAIN = [
    "--data.train=" + json.dumps(MINE),
    "--data.init_args.train=" + json.dumps(MINE),
    '--data={"init_args": {"train": [{"path": "mine.jsonl"}]}}',
    "--data.init_args.train=" + str(MINE),  # as a sweep writes it
    {"data": {"class_path": "lit_align.PromptDataModule", "init_args": {"train": MINE}}},
    {"data": {"init_args": {"train": MINE}}},
]


@pytest.mark.parametrize("again", AGAIN, ids=str)
def test_sources(parsed: Callable, again: Any) -> None:
    config = parsed(again)
    assert sources(config) == MINE
    assert config["data"]["init_args"]["train"][0]["format"] == "auto"
    assert sources(config, "val") == [{"path": "a.json"}, {"path": "b.json", "limit": 3}]


def test_two_for_two_and_in_two_words(parsed: Callable) -> None:
    config = parsed("--data.val", '[{"path": "c.json"}, {"hub": "d/e"}]')
    assert sources(config, "val") == [{"path": "c.json"}, {"hub": "d/e"}]


def test_rewards_within_a_reward(parsed: Callable) -> None:
    again = [{"class_path": LENGTH, "init_args": {"target": 20}}]
    for given in (
        f"--model.reward.rewards={json.dumps(again)}",
        {"model": {"init_args": {"reward": {"init_args": {"rewards": again}}}}},
    ):
        (reward,) = parsed(given)["model"]["init_args"]["reward"]["init_args"]["rewards"]
        assert (reward["init_args"]["target"], reward["init_args"]["shape"]) == (20, "near")


def test_callbacks(parsed: Callable) -> None:
    again = [{"class_path": STOP, "init_args": {"monitor": "val/accuracy"}}]
    for given in (f"--trainer.callbacks={json.dumps(again)}", {"trainer": {"callbacks": again}}):
        (callback,) = parsed(given)["trainer"]["callbacks"]
        assert (callback["init_args"]["monitor"], callback["init_args"]["patience"]) == ("val/accuracy", 3)


def test_a_list_for_one_logger_and_one_for_a_list(parsed: Callable) -> None:
    one, other = ({"class_path": CSV, "init_args": {"save_dir": name}} for name in ("y", "z"))
    (logger,) = parsed(f"--trainer.logger={json.dumps([one])}")["trainer"]["logger"]
    assert (logger["init_args"]["save_dir"], logger["init_args"]["name"]) == ("y", "lightning_logs")
    logger = parsed(f"--trainer.logger={json.dumps([one])}", f"--trainer.logger={json.dumps(other)}")["trainer"][
        "logger"
    ]
    assert logger["init_args"]["save_dir"] == "z"


def test_what_is_not_a_list_is_merged_as_before(parsed: Callable) -> None:
    config = parsed("--data.train.limit=5", '--model.network={"dropout": 0.1}')
    assert sources(config) == [{"hub": "a/b", "limit": 5, "columns": {"prompt": "x"}}]
    assert (config["model"]["init_args"]["network"]["name"], config["model"]["init_args"]["network"]["dropout"]) == (
        "m",
        0.1,
    )


def test_a_plus_appends(parsed: Callable) -> None:
    config = parsed('--data.train+={"path": "mine.jsonl"}')
    assert [source["path"] or source["hub"] for source in config["data"]["init_args"]["train"]] == ["a/b", "mine.jsonl"]


def test_the_last_of_three_counts(parsed: Callable) -> None:
    second = {"data": {"init_args": {"train": [{"path": "x.json", "limit": 2}]}}}
    assert sources(parsed(second, "--data.train=[{path: y.json}]", "--data.train=[{path: z.json}]")) == [
        {"path": "z.json"}
    ]


def test_the_list_of_another_class(parsed: Callable) -> None:
    rewards = [{"class_path": LENGTH, "init_args": {"target": 3}}]
    ensemble = {"class_path": "lit_align.EnsembleReward", "init_args": {"rewards": rewards}}
    reward = parsed({"model": {"init_args": {"reward": ensemble}}})["model"]["init_args"]["reward"]
    assert reward["class_path"].endswith("EnsembleReward")
    assert reward["init_args"]["rewards"][0]["init_args"]["shape"] == "near"
