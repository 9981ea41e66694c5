"""Figures of a reward model's report card."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes

from lit_align.evaluation.intervals import Interval
from lit_align.report.figures import BLUE, GREEN, GREY, ORANGE, as_svg, panels, text

MOST = 12  # categories that a figure shows


def draw_reward(card: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """Name of the file, heading, SVG and caption of each figure."""
    shown = []
    with panels(10.4, 3.3, 3) as (figure, (accuracy, reliability, margins)):
        draw_accuracy(accuracy, card)
        draw_reliability(reliability, card["calibration"]["reliability"], low=0.5)
        reliability.set_xlabel("sigmoid(|margin|)")
        reliability.set_ylabel("share that agrees with the model")
        draw_margins(margins, card["by_margin"])
        shown.append(
            (
                "reward",
                "Accuracy and calibration",
                as_svg(figure),
                "Left: accuracy beside two rules that read nothing but length, intervals of 95 % over prompts; the "
                "dashed line is chance. Middle: a calibrated model lies on the line; the area of a dot is its share of "
                "pairs. Right: from the pairs that the model is least sure of to those that it is most sure of.",
            )
        )
    if card["by_category"]:
        names = list(card["by_category"])[:MOST]
        with panels(6.4, 0.34 * len(names) + 1.0) as (figure, (ax,)):
            for row, (column, colour, mark) in enumerate(
                (("accuracy", BLUE, "o"), ("longer_wins", ORANGE, "^"), ("shorter_wins", GREEN, "v"))
            ):
                values = [card["by_category"][name][column] for name in names]
                places = np.arange(len(names)) + 0.2 * (row - 1)
                _dots(ax, values, places, colour, mark, column.replace("_", " "))
            ax.set_yticks(range(len(names)), [text(name)[:40] for name in names])
            ax.invert_yaxis()
            ax.axvline(0.5, color=GREY, linewidth=1, linestyle="--")
            ax.legend(fontsize=8)
            ax.set_xlabel("share of pairs")
            shown.append(("categories", "Accuracy by category", as_svg(figure), "The largest categories first."))
    return shown


def draw_accuracy(ax: Axes, card: dict[str, Any]) -> None:
    """Accuracy beside its baselines."""
    rows = [
        ("reward model", card["accuracy"], BLUE, "o"),
        ("longer wins", card["longer_wins"], ORANGE, "^"),
        ("shorter wins", card["shorter_wins"], ORANGE, "v"),
        ("length-balanced", card["accuracy_length_balanced"], BLUE, "s"),
        ("longer is better", card["accuracy_longer_is_better"], BLUE, "^"),
        ("shorter is better", card["accuracy_shorter_is_better"], BLUE, "v"),
    ]
    if card["annotators_with_majority"] is not None:
        rows.append(("annotators", card["annotators_with_majority"], GREEN, "D"))
    rows = [row for row in rows if row[1].observations]
    ax.axvline(0.5, color=GREY, linewidth=1, linestyle="--")
    for place, (_, value, colour, mark) in enumerate(rows):
        _dots(ax, [value], np.array([place]), colour, mark, None)
    ax.set_yticks(range(len(rows)), [name for name, *_ in rows])
    ax.invert_yaxis()
    ax.set_xlabel("share of pairs")
    ax.set_title("accuracy")


def draw_reliability(ax: Axes, rows: list[dict[str, float]], low: float = 0.0, colour: str = BLUE) -> None:
    """How often what was held likely came true."""
    ax.plot([low, 1], [low, 1], color=GREY, linewidth=1, linestyle="--")
    total = sum(row["count"] for row in rows)
    x, y = ([row[name] for row in rows] for name in ("confidence", "outcome"))
    ax.plot(x, y, color=colour, linewidth=1)
    ax.scatter(x, y, s=[12 + 200 * row["count"] / total for row in rows], color=colour, alpha=0.8)
    ax.set_xlim(low - 0.02, 1.02)
    ax.set_ylim(min(low, *y) - 0.03, 1.03)
    ax.set_title("reliability")


def draw_margins(ax: Axes, rows: list[dict[str, Any]]) -> None:
    """Accuracy by margin."""
    for place, row in enumerate(rows):
        value = row["accuracy"]
        if not np.isnan(value.low):
            ax.plot([place, place], [value.low, value.high], color=BLUE, linewidth=1.6)
        ax.plot(place, value.value, "o", color=BLUE, markersize=5)
    ax.axhline(0.5, color=GREY, linewidth=1, linestyle="--")
    ax.set_xticks(range(len(rows)), [f"{row['low']:.2f}+" for row in rows], fontsize=8)
    ax.set_xlabel("|margin|")
    ax.set_title("accuracy by margin")


def _dots(
    ax: Axes, values: list[Interval], places: np.ndarray[Any, Any], colour: str, mark: str, name: str | None
) -> None:
    for value, place in zip(values, places, strict=True):
        if not np.isnan(value.low):
            ax.plot([value.low, value.high], [place, place], color=colour, linewidth=1.6)
    ax.plot([value.value for value in values], places, mark, color=colour, markersize=5, label=name)
