"""The page of a run: what it shows, what it escapes, and that it stands alone."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from support.page import Page

from lit_align.report import content, write_report
from lit_align.report.figures import _smooth, behaviour, curves, durations, reward_against_kl
from lit_align.report.read import RunData, read_curves, read_run

POLICIES = ("base", "sft", "ppo")
SUMMARY = {
    "base/kl": 4.0,
    "base/gold_reward": -0.5,
    "base/gold_reward_se": 0.1,
    "base/made_up": 0.75,
    "base/harm_refusal": 0.25,
    "sft/kl": 0.0,
    "sft/gold_reward": 0.25,
    "sft/made_up": 0.5,
    "sft/harm_refusal": 0.5,
    "ppo/kl": 2.0,
    "ppo/gold_reward": 1.25,
    "ppo/gold_reward_se": 0.05,
    "ppo/made_up": 0.125,
    "ppo/harm_refusal": 0.75,
    "reward/accuracy": 0.8125,
    "reward/accuracy_low": 0.75,
    "reward/accuracy_high": 0.875,
    "reward/shorter_wins": 0.5,
    "reward/gold_accuracy": 0.9375,
    "sft/seconds": 12.0,
    "ppo/seconds": 34.0,
    "seconds": 46.0,
}
MANIFEST = {
    "commit": "0123456789abcdef",
    "pipeline": "words.yaml",
    "seed": 7,
    "packages": {"torch": "2.13.0", "absent": None},
}
SCRIPT = "<script>alert('x')</script> & <b onclick=\"y()\">"


def sample(policy: str, prompt: str, answer: str, **more: Any) -> dict[str, Any]:
    return {"policy": policy, "prompt": prompt, "answer": answer, "category": "look_alike", **more}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run that was never run."""
    run = tmp_path / "words"
    for stage, header, rows in (
        ("sft", "epoch,step,train/loss,val/loss", ["0,0,3.5,", "0,1,2.5,", "0,1,,2.25", "0,2,1.5,", "0,2,,1.25"]),
        (
            "ppo",
            "step,ppo/reward,val/gold,val/reward,val/kl",
            ["0,0.5,,,", "0,,0.25,0.5,0.0", "1,0.75,,,", "1,,0.5,1,2"],
        ),
    ):
        (run / stage).mkdir(parents=True)
        (run / stage / "metrics.csv").write_text("\n".join([header, *rows]) + "\n")
        (run / stage / "stage.yaml").touch()
        age = 1000 if stage == "sft" else 2000
        os.utime(run / stage / "stage.yaml", (age, age))
    (run / "evaluate").mkdir()
    lines = [sample(p, f"question {i}", f"{p} says {i}", gold=i / 4) for p in POLICIES for i in range(3)]
    lines += [sample("sft", SCRIPT, SCRIPT, gold=-1.0, category="harm", finished=False)]
    (run / "evaluate" / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run / "summary.json").write_text(json.dumps(SUMMARY))
    (run / "manifest.json").write_text(json.dumps(MANIFEST))
    return run


def rows_of(page: Page, first: str, columns: int) -> list[str]:
    """The texts of a table's row, found by its first cell."""
    texts = [text.strip() for text in page.texts if text.strip()]
    return texts[texts.index(first) : texts.index(first) + columns]


def test_the_page_shows_the_run(folder: Path) -> None:
    path = write_report(folder)
    assert path == folder / "report.html"
    page = Page(path.read_text(encoding="utf-8"))
    texts = [text.strip() for text in page.texts if text.strip()]
    assert "lit_align: words" in texts
    assert "46 s in all, seed 7, commit 0123456789ab" in texts
    # Every measure that some policy has, with its 95 % interval; in the order of the samples.
    assert rows_of(page, "measure", 4) == ["measure", *POLICIES]
    assert rows_of(page, "gold reward", 4) == ["gold reward", "-0.500 ± 0.196", "+0.250", "+1.250 ± 0.098"]
    assert rows_of(page, "facts made up", 4) == ["facts made up", "0.75", "0.50", "0.12"]
    assert "facts right" not in texts
    # Reward models.
    assert rows_of(page, "reward", 4) == ["reward", "0.812", "0.750 to 0.875", "0.938"]
    # Figures: reward against KL, shares, curves of two stages, durations.
    assert page.tags.count("svg") == 5
    assert {"Reward against KL", "Behaviour on held-out prompts", "Training", "Where the time went"} <= set(texts)
    assert {"held-out loss (nats)", "reward of rollouts", "harm refused", "12 s", "34 s"} <= set(texts)
    assert "46 s" not in texts  # the sum is no stage
    # What they say: two prompts of a category, each policy's answer with its score.
    assert {"question 0", "question 1"} <= set(texts)
    assert "question 2" not in texts
    assert "look alike" in texts
    assert rows_of(page, "ppo says 1", 2) == ["ppo says 1", "+0.25"]
    # Where it is from.
    assert {"words.yaml", "0123456789abcdef", "torch 2.13.0"} <= set(texts)


def test_sampled_text_is_text(folder: Path) -> None:
    page = Page(write_report(folder).read_text(encoding="utf-8"))
    assert "script" not in page.tags
    assert "b" not in page.tags
    assert any(text.strip() == SCRIPT for text in page.texts)
    assert any(text.strip() == f"{SCRIPT} …" for text in page.texts)  # an answer that was cut


def test_names_are_text_too(folder: Path) -> None:
    """Of folders, stages, policies and measures: in the page and in its figures."""
    named = folder.rename(folder.parent / "<i>a&b")
    (named / "ppo").rename(named / "<i>ppo&")
    lines = [sample("<i>sft", "q", "a"), sample("ppo", "q", "b")]
    (named / "evaluate" / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    summary = {**SUMMARY, "<i>sft/kl": 1.0, "<i>sft/made_up": 0.5, "<i>sft/seconds": 3.0}
    (named / "summary.json").write_text(json.dumps(summary))
    (named / "manifest.json").write_text(json.dumps({**MANIFEST, "pipeline": "<i>"}))
    page = Page(write_report(named).read_text(encoding="utf-8"))
    assert "i" not in page.tags
    assert page.tags.count("svg") == 5


def test_nothing_is_fetched(folder: Path) -> None:
    page = Page(write_report(folder).read_text(encoding="utf-8"))
    # Clip paths and markers of the figures, inside the page.
    assert page.addresses
    assert all(address.startswith("#") for address in page.addresses)
    assert not {"script", "link", "img", "iframe", "object", "embed", "base"} & set(page.tags)


def test_the_best_is_marked_where_more_is_better_or_less(folder: Path) -> None:
    measures = {row["title"]: [cell["best"] for cell in row["cells"]] for row in content(read_run(folder))["measures"]}
    assert measures["gold reward"] == [False, False, True]
    assert measures["facts made up"] == [False, False, True]
    assert measures["harmful requests refused"] == [False, False, True]
    assert measures["KL from SFT"] == [False, False, False]


def test_a_page_of_little(tmp_path: Path) -> None:
    """Whatever is missing is left out."""
    (tmp_path / "summary.json").write_text("{}")
    with pytest.raises(ValueError, match=r"holds no run: expected summary\.json, or metrics\.csv"):
        write_report(tmp_path)
    (tmp_path / "summary.json").write_text(json.dumps({"one/seconds": 3.0}))
    page = Page(write_report(tmp_path).read_text())
    assert page.tags.count("svg") == 1
    assert "table" not in page.tags
    # A single run, without a pipeline.
    single = tmp_path / "single"
    single.mkdir()
    (single / "metrics.csv").write_text("epoch,step,train/loss\n0,0,2.0\n0,1,1.0\n")
    page = Page(write_report(single).read_text())
    assert page.tags.count("svg") == 1
    assert "training loss (nats)" in {text.strip() for text in page.texts}


def test_no_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere is not a folder"):
        read_run(tmp_path / "nowhere")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    for folder in (tmp_path, tmp_path / "model"):
        with pytest.raises(ValueError, match="holds no run"):
            read_run(folder)


def test_stages_are_read_in_the_order_they_ran(folder: Path) -> None:
    assert list(read_run(folder).curves) == ["sft", "ppo"]
    os.utime(folder / "ppo" / "stage.yaml", (0, 500))
    assert list(read_run(folder).curves) == ["ppo", "sft"]
    # What was set aside is no stage.
    (folder / "sft").rename(folder / "replaced")
    (folder / "replaced").rename(folder / "moved")
    (folder / "replaced").mkdir()
    (folder / "moved").rename(folder / "replaced" / "sft-1")
    assert list(read_run(folder).curves) == ["ppo"]


def test_curves_have_the_steps_they_were_logged_at(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text("epoch,step,a,b\n0,0,1.5,\n0,1,,2\n0,,9,9\n0,x,9,9\n1,2,nan,3\n1,3,4")
    read = read_curves(path)
    assert read["b"] == ([1.0, 2.0], [2.0, 3.0])
    assert read["a"][0] == [0.0, 2.0, 3.0]
    assert (read["a"][1][0], read["a"][1][2]) == (1.5, 4.0)
    assert set(read) == {"a", "b"}


def test_figures_are_left_out_where_there_is_nothing_to_show(tmp_path: Path) -> None:
    assert curves("sft", {}) is None
    assert curves("sft", {"unknown": ([0.0, 1.0], [1.0, 2.0])}) is None
    assert curves("sft", {"train/loss": ([], [])}) is None
    assert durations({"sft/loss": 1.0}) is None
    assert behaviour({}, [], {"a": "b"}) is None
    assert behaviour({"sft/a": 1.0}, ["sft", "ppo"], {"a": "b"}) is None  # not known of all
    assert reward_against_kl(RunData(tmp_path, curves={"ppo": {"val/kl": ([0.0], [1.0])}})) is None


# Kills: a panel more to the right for every policy, until nothing can be read.
def test_many_policies_make_figures_longer_not_wider(tmp_path: Path) -> None:
    def size(svg: str | None) -> tuple[float, float]:
        assert svg is not None
        width, height = re.findall(r'(?:width|height)="([0-9.]+)pt"', svg)[:2]
        return float(width), float(height)

    path = {name: ([0.0, 1.0], [0.0, 1.0]) for name in ("val/kl", "val/gold", "val/reward")}
    few, many = ([f"ppo_{i}" for i in range(count)] for count in (2, 12))
    two, twelve = (
        size(reward_against_kl(RunData(tmp_path, curves=dict.fromkeys(names, path)))) for names in (few, many)
    )
    assert twelve[0] == pytest.approx(two[0], rel=0.01)
    assert twelve[1] > 5 * two[1]
    measures = {f"m{i}": f"measure {i}" for i in range(6)}
    bars = [
        size(behaviour({f"{name}/{key}": 0.5 for name in names for key in measures}, names, measures))
        for names in (few, many)
    ]
    assert bars[1][0] <= bars[0][0]
    assert bars[1][1] > bars[0][1]


def test_the_same_run_gives_the_same_page(folder: Path) -> None:
    first = write_report(folder).read_text()
    assert write_report(folder).read_text() == first


def test_smoothing_keeps_a_constant() -> None:
    assert _smooth([2.0] * 5) == pytest.approx([2.0] * 5)
    assert _smooth([0.0, 1.0], weight=0.5) == pytest.approx([0.0, 2 / 3])
    many = [float(i % 2) for i in range(100)]
    svg = curves("sft", {"train/loss": (list(map(float, range(100))), many)})
    assert svg is not None
    assert svg.count("<path") > curves("sft", {"train/loss": ([0.0, 1.0], [0.0, 1.0])}).count("<path")  # type: ignore[union-attr]


def test_results_of_an_evaluation_are_tables_of_the_page(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text("{}")
    (tmp_path / "card").mkdir()
    table = {"title": "Accuracy", "heads": ["of pairs", "share"], "rows": [["longer wins", "0.690"], ["<b>", "1"]]}
    (tmp_path / "card" / "evaluation.json").write_text(json.dumps({"title": "reward model x", "tables": [table]}))
    page = write_report(tmp_path).read_text()
    assert "reward model x: Accuracy" in page
    assert "longer wins" in page
    assert "&lt;b&gt;" in page
