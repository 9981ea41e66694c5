"""`lit-align evaluate reward`: the report card of a reward model's folder on any preference source."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lit_align.data.rows import Tally
from lit_align.data.source import Source, as_source
from lit_align.data.strings import Template
from lit_align.evaluation.comparisons import read_comparisons
from lit_align.evaluation.results import Result, check_free, count, short, table
from lit_align.evaluation.reward_card import agreement, report_card
from lit_align.evaluation.reward_figures import draw_reward
from lit_align.evaluation.reward_scores import RewardScores
from lit_align.models.network import Network, as_network


class EvaluateReward:
    """Measures a reward model on judged answers: a command, and a `call` stage of a pipeline.

    Args:
        model: folder of a reward model.
        pairs: judged answers: pairs, rankings, shares of several annotators, grades.
        second: another reward model, for their agreement.
        category: column that names the category of a row; null for none.
        max_length: of a prompt and its answer, in tokens; null for the model's own limit.
        batch_tokens: tokens that the model computes at once.
        buckets: of margins.
        resamples: of the bootstrap over prompts.
        template: of prompts that are plain text.
        seed: of the resampling and of the length-balanced subset.
        device: where the model runs; auto for a GPU if there is one.
    """

    def __init__(
        self,
        model: Network,
        pairs: Source,
        second: Network | None = None,
        category: str | None = None,
        max_length: int | None = None,
        batch_tokens: int = 8192,
        buckets: int = 5,
        resamples: int = 2000,
        template: Template = "auto",
        seed: int = 0,
        device: str = "auto",
    ) -> None:
        self.model, self.pairs = as_network(model), as_source(pairs)
        self.second = None if second is None else as_network(second)
        self.category, self.max_length, self.batch_tokens = category, max_length, batch_tokens
        self.buckets, self.resamples, self.template = buckets, resamples, template
        self.seed, self.device = seed, device

    def run(self, out: Path) -> dict[str, float]:
        """Write the results into a folder; return the numbers."""
        check_free(out)
        tally = Tally()
        comparisons = read_comparisons(self.pairs, tally, self.category)
        data = {"data": self.pairs.name, "rows": self.pairs.fingerprint()}

        def scores(network: Network, file: str) -> list[list[float]]:
            scorer = RewardScores(network, self.max_length, self.batch_tokens, self.template, self.device)
            return scorer(comparisons, tally, out / file, data)

        first = scores(self.model, "scores.jsonl")
        card = report_card(comparisons, first, self.buckets, self.resamples, self.seed)
        card |= {"rows": {name: count for name, count in tally.items() if count}, "seed": self.seed}
        card |= {"model": self.model.name, "data": self.pairs.name}
        if self.second is not None:
            counted = Tally()
            counted.update(tally)
            other = scores(self.second, "scores_second.jsonl")
            card["second"] = {
                "model": self.second.name,
                "accuracy": report_card(comparisons, other, 1, self.resamples, self.seed)["accuracy"],
                **agreement(comparisons, first, other, self.resamples, self.seed),
            }
        return result(card, tally).write(out)


def result(card: dict[str, Any], tally: Tally) -> Result:
    """Tables, notes and figures of a report card."""
    return Result(
        "reward",
        f"reward model {short(card['model'])} on {short(card['data'])}",
        f"{card['pairs']:,} pairs of {card['prompts']:,} prompts; intervals are of 95 %, by a bootstrap over prompts",
        card,
        notes(card, tally),
        tables(card),
        draw_reward(card),
    )


def notes(card: dict[str, Any], tally: Tally) -> list[str]:
    """What was left out, and what the figures warn of."""
    said = [f"{tally['rows']:,} rows read: {tally}."] if tally.first_skipped or tally["truncated"] else []
    for name, what in (
        ("ties_in_the_labels", "pairs are judged equal, and count in no accuracy"),
        ("pairs_without_a_score", "pairs have a score that is NaN or infinite, and are left out"),
        ("equal_scores", "pairs have equal scores: each counts one half"),
        ("empty_answers", "answers are empty"),
    ):
        if card[name]:
            said.append(f"{card[name]:,} {what}.")
    accuracy = card["accuracy"]
    best = max(("longer_wins", "shorter_wins"), key=lambda name: card[name].value)
    if accuracy.low <= card[best].value:
        rule = best.replace("_", " ")
        said.append(
            f"The model is not shown to be better than the rule '{rule}' ({card[best].value:.3f}), which reads nothing."
        )
    if card["calibration"]["outcome"] == "one label a pair":
        said.append("The source has one label a pair: the annotators' ceiling is not known, and is below 1.")
    return said


def tables(card: dict[str, Any]) -> list[dict[str, Any]]:
    """Accuracy, calibration, margins, categories, best-of-n, the second model."""
    rows = [
        ("the reward model", card["accuracy"]),
        ("longer wins", card["longer_wins"]),
        ("shorter wins", card["shorter_wins"]),
        ("... where the longer is better", card["accuracy_longer_is_better"]),
        ("... where the shorter is better", card["accuracy_shorter_is_better"]),
        ("... on the length-balanced subset", card["accuracy_length_balanced"]),
        ("one annotator with the majority (ceiling)", card["annotators_with_majority"]),
        ("the model picks the longer answer", card["model_picks_longer"]),
    ]
    shown = [
        table(
            "Accuracy",
            ["of pairs", "share [95 %]", "pairs"],
            [(name, value, count(value)) for name, value in rows],
        )
    ]
    told = card["calibration"]
    rows_of: list[tuple[str, Any]] = [
        ("ECE, 10 bins", told["ece_10"]),
        ("ECE, 15 bins", told["ece_15"]),
        ("Brier score of sigmoid(margin)", told["brier"]),
        ("Brier score of no opinion", told["brier_of_no_opinion"]),
        ("temperature that repairs it", told["temperature"]),
        ("score and length, Pearson", card["length"]["pearson"]),
        ("score and length, Spearman", card["length"]["spearman"]),
        ("score and length within prompts", card["length"]["within_prompt"]),
    ]
    shown.append(table("Calibration and length", ["measure", "value [95 %]"], rows_of))
    shown.append(
        table(
            "Accuracy by margin",
            ["margin", "sigmoid(margin)", "accuracy [95 %]", "pairs"],
            [
                (
                    f"{row['low']:.3f} to {row['high']:.3f}",
                    row["confidence"],
                    row["accuracy"],
                    count(row["accuracy"]),
                )
                for row in card["by_margin"]
            ],
        )
    )
    if card["by_category"]:
        of = [(name, *values.values(), count(values["accuracy"])) for name, values in card["by_category"].items()]
        shown.append(
            table("Accuracy by category", ["category", "accuracy", "longer wins", "shorter wins", "pairs"], of)
        )
    best = [(f"best of {row['n']}", row["gain"], row["gain_of_the_judge"]) for row in card["best_of_n"]]
    if best:
        unit = card["best_of_n"][0]["unit"]
        shown.append(table(f"Best of n: gain in the {unit}", ["choice", "gain [95 %]", "gain of the labels"], best))
    if second := card.get("second"):
        names = ("accuracy", "agreement", "accuracy_gain", "right_where_they_differ")
        compared = [(name.replace("_", " "), second[name]) for name in names]
        shown.append(table(f"Beside {short(second['model'])}", ["measure", "value [95 %]"], compared))
    return shown
