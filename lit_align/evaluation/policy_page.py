"""Tables and figures of a policy's evaluation."""

from __future__ import annotations

from typing import Any

import numpy as np

from lit_align.evaluation.intervals import Interval
from lit_align.evaluation.over_optimization import Fit
from lit_align.evaluation.results import table
from lit_align.evaluation.reward_figures import draw_reliability
from lit_align.report.figures import BLUE, GREY, ORANGE, as_svg, panels, text

MEASURES = {
    "reward": "reward",
    "gold": "gold reward",
    "words": "words of an answer",
    "tokens": "tokens of an answer",
    "finished": "answers that ended by themselves",
    "entropy": "entropy (nats per token, of what was sampled)",
    "text_loss": "loss on text (nats per token)",
    "empty_answers": "empty answers",
}
DIVERSITY = {
    "distinct_per_prompt": "distinct bigrams, answers to one prompt",
    "overlap_per_prompt": "bigrams shared with another answer to the prompt",
    "same_per_prompt": "answers that repeat another word for word",
    "distinct_across": "distinct bigrams, across prompts",
    "overlap_across": "bigrams shared with an answer to another prompt",
}
CALIBRATION = {
    "accuracy": "accuracy",
    "confidence": "confidence",
    "ece_10": "ECE, 10 bins",
    "ece_15": "ECE, 15 bins",
    "brier": "Brier score",
    "nll": "negative log-likelihood (nats)",
    "temperature": "temperature that repairs it",
    "ece_10_unrepaired": "ECE of every second question",
    "ece_10_repaired": "... at that temperature",
}
WINS = {
    "win_rate": "win rate, a tie counting half",
    "ties": "ties",
    "length_controlled": "length-controlled win rate",
    "flips": "verdicts that the other order reverses",
    "first_shown_wins": "what is shown first wins",
    "longer_wins": "the longer one wins",
    "longer_is_ours": "the longer answer is the policy's",
    "undecided": "pairs that are undecided",
}
Table = dict[str, Any]


def policy_tables(figures: dict[str, Any], names: dict[str, str]) -> list[Table]:
    """Answers, refusals, diversity, calibration, win rates, best-of-n; a column for each policy."""
    of = {name: figures[name] for name in names}

    def rows(measures: dict[str, str], inside: str | None = None) -> list[list[Any]]:
        found = {name: one.get(inside, {}) if inside else one for name, one in of.items()}
        return [
            [title, *(found[name].get(key, "") for name in names)]
            for key, title in measures.items()
            if any(key in one for one in found.values())
        ]

    heads = list(names.values())
    shown = [
        table("Answers", ["measure", *heads], rows(MEASURES)),
        table("Refusals", ["kind, measure", *heads], _refusals(of)),
        table("Diversity", ["measure", *heads], rows(DIVERSITY, "diversity")),
        table("Calibration on multiple choice", ["measure", *heads], rows(CALIBRATION, "calibration")),
    ]
    shown += _against(figures.get("against_reference", {}))
    for name, title in names.items():
        if best := figures[name].get("best_of_n"):
            points = [(f"best of {p['n']}", f"{p['kl_bound']:.2f}", p["proxy"], p["gold"]) for p in best["points"]]
            heads_of = ["choice", "KL at most (nats)", "gain of the reward", "gain of gold"]
            shown.append(table(f"Best of n: {title}", heads_of, points))
    return [one for one in shown if one["rows"]]


def _refusals(of: dict[str, dict[str, Any]]) -> list[list[Any]]:
    kinds = dict.fromkeys(kind for one in of.values() for kind in one.get("refusals", {}))
    return [
        [f"{kind}, {what}", *(one.get("refusals", {}).get(kind, {}).get(what, "") for one in of.values())]
        for kind in kinds
        for what in ("refusal", "partial", "compliance", "undecided")
    ]


def _against(told: dict[str, Any]) -> list[Table]:
    if not told:
        return []
    judges = {name.removesuffix("_win_rate"): told[name] for name in told if name.endswith("_win_rate")}
    columns = {**judges, **{f"planted: {n.replace('_', ' ')}": one for n, one in told["planted_judges"].items()}}
    rows = [[title, *(one[key] for one in columns.values())] for key, title in WINS.items()]
    shown = [table("Win rate over the reference, by judge", ["measure", *columns], rows)]
    gains = {name: told[f"{name}_gain"] for name in judges}
    titles = {
        "gain": "gain of the mean",
        "within": "gain among answers of like length",
        "ratio": "share that length does not explain",
        "outside": "answers in buckets of one policy alone",
    }
    rows = [[title, *(gain[key] for gain in gains.values())] for key, title in titles.items()] if gains else []
    shown.append(table("Gain over the reference, and length", ["measure", *gains], rows))
    if "kl" in told:
        shown.append(table("Distance", ["measure", "value"], [["KL from the reference (nats per answer)", told["kl"]]]))
    return shown


def draw_policy(figures: dict[str, Any], names: dict[str, str]) -> list[tuple[str, str, str, str]]:
    """Refusals, reliability, best-of-n: name of the file, heading, SVG, caption."""
    shown = []
    of = {name: figures[name] for name in names}
    if any(len(one.get("refusals", {})) > 1 for one in of.values()):
        kinds = list(dict.fromkeys(kind for one in of.values() for kind in one.get("refusals", {})))
        with panels(6.6, 0.34 * len(kinds) + 1.1) as (figure, (ax,)):
            for number, (name, colour, mark) in enumerate(zip(names, (BLUE, ORANGE), ("o", "s"), strict=False)):
                for place, kind in enumerate(kinds):
                    value = of[name]["refusals"].get(kind, {}).get("refusal")
                    if isinstance(value, Interval) and not np.isnan(value.value):
                        y = place + 0.18 * (number - (len(names) - 1) / 2)
                        ax.plot([value.low, value.high], [y, y], color=colour, linewidth=1.6)
                        label = text(names[name]) if place == 0 else None
                        ax.plot(value.value, y, mark, color=colour, markersize=5, label=label)
            ax.set_yticks(range(len(kinds)), [text(kind)[:40] for kind in kinds])
            ax.invert_yaxis()
            ax.set_xlim(-0.02, 1.02)
            ax.set_xlabel("share of answers that refuse")
            ax.legend(fontsize=8)
            shown.append(("refusals", "Refusals by kind of prompt", as_svg(figure), "Intervals of 95 % over prompts."))
    calibrated = [name for name in names if "calibration" in of[name]]
    if calibrated:
        with panels(3.4 * len(calibrated), 3.2, len(calibrated)) as (figure, axes):
            for ax, name in zip(axes, calibrated, strict=True):
                draw_reliability(ax, of[name]["calibration"]["reliability"])
                ax.set_title(text(names[name])[:36])
                ax.set_xlabel("confidence of the answer")
                ax.set_ylabel("share that is right")
            caption = "A calibrated model lies on the line; the area of a dot is its share of questions."
            shown.append(("reliability", "Calibration on multiple choice", as_svg(figure), caption))
    curves = [name for name in names if "best_of_n" in of[name]]
    if curves:
        with panels(4.4 * len(curves), 3.2, len(curves)) as (figure, axes):
            for ax, name in zip(axes, curves, strict=True):
                _draw_curve(ax, of[name]["best_of_n"])
                ax.set_title(text(names[name])[:40])
            caption = (
                "Gain of the best of n answers over one, against the square root of its KL bound; the line is "
                "R = d (a - b d), fitted on n up to 64."
            )
            shown.append(("best_of_n", "Best of n", as_svg(figure), caption))
    return shown


def _draw_curve(ax: Any, best: dict[str, Any]) -> None:
    for column, colour, mark in (("proxy", ORANGE, "^"), ("gold", BLUE, "o")):
        d = [point["d"] for point in best["points"]]
        values = [point[column] for point in best["points"]]
        ends = [[v.value - v.low for v in values], [v.high - v.value for v in values]]
        ends_known = np.nan_to_num(np.maximum(np.array(ends), 0))
        y = [value.value for value in values]
        ax.errorbar(d, y, yerr=ends_known, fmt=mark, color=colour, markersize=4, capsize=2, label=column)
    if best["fit"] is not None:
        fitted = Fit("best_of_n", best["fit"]["a"].value, best["fit"]["b"].value)
        x = np.linspace(0, max(point["d"] for point in best["points"]), 60)
        ax.plot(x, fitted(x), color=GREY, linewidth=1.2, linestyle="--", label="fit of gold")
    ax.set_xlabel("sqrt(KL bound)")
    ax.set_ylabel("gain")
    ax.legend(fontsize=8)
