"""The page of `lit-align agreement`: tables and figures of one label set."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from lit_align.feedback.statistics import Interval
from lit_align.report import write_page
from lit_align.report.figures import BLUE, GREY, ORANGE, as_svg, panels, text

NAMES = {
    "agreement": "pairwise agreement",
    "alpha_nominal": "Krippendorff's alpha, nominal",
    "alpha_ordinal": "Krippendorff's alpha, ordinal (a tie lies between)",
    "alpha_ordinal_strength": "Krippendorff's alpha, ordinal with strengths",
    "fleiss_kappa": "Fleiss' kappa",
}
TRAITS = {
    "length": "prefers the longer completion",
    "position": "prefers the one shown first",
    "confidence": "prefers the one with fewer hedges",
}
MOST_ROWS = 60  # names that a figure shows; tables show all


def write_agreement(figures: dict[str, Any], path: Path, title: str) -> Path:
    """Write the page.

    Args:
        figures: of `agreement`.
        path: the file.
        title: of the page: the label set's name.

    Raises:
        FileExistsError: a page of that name is not one of lit_align's.
    """
    return write_page(path, content(figures, title))


def content(figures: dict[str, Any], title: str) -> dict[str, Any]:
    """Everything the page shows."""
    tables = [_overall(figures), _annotators(figures), _biases(figures), _groups(figures, "categories", "category")]
    tables += [_groups(figures, "criteria", "criterion"), _two_by_two(figures), _sources(figures)]
    return {
        "title": f"lit_align: agreement of {title}",
        "subtitle": f"{figures['labels']:,} labels by {len(figures['annotators']):,} annotators of "
        f"{figures['tasks']:,} tasks, {figures['pairs']:,} pairs of completions; intervals are of 95 %, over tasks",
        "notes": _notes(figures),
        "tables": [table for table in tables if table["rows"]],
        "sections": [
            {"title": heading, "figures": [{"svg": Markup(svg), "caption": caption}]}
            for heading, svg, caption in _figures(figures)
            if svg
        ],
    }


def _notes(figures: dict[str, Any]) -> list[str]:
    notes = []
    if not figures["pairs_judged_by_several"]:
        notes.append("No pair was judged by two annotators: there is no agreement to measure.")
    elif figures["overall"]["alpha_nominal"].high < 0.4:
        notes.append(
            "Alpha is below 0.4 for all that its interval says: annotators may understand the guideline differently. "
            "Look at categories and at annotators below before training on these labels."
        )
    if figures["replaced"]:
        notes.append(f"{figures['replaced']:,} labels were replaced by a later one of the same annotator and task.")
    if len(figures["guidelines"]) > 1:
        notes.append(f"Labels follow {len(figures['guidelines'])} versions of the guideline.")
    failing = [n for n, a in figures["annotators"].items() if a["controls"] and (a["controls_passed"] or 0) < 0.7]
    if failing:
        notes.append(f"Fewer than 70 % of pairs of controls right: {', '.join(failing)}.")
    return notes


def _overall(figures: dict[str, Any]) -> dict[str, Any]:
    rows = [[NAMES[name], str(value)] for name, value in figures["overall"].items()]
    return {"title": "Agreement", "heads": ["measure", "value, 95 % interval"], "rows": rows}


def _annotators(figures: dict[str, Any]) -> dict[str, Any]:
    rows = [
        [
            name,
            f"{of['labels']:,}",
            str(of["agreement_with_others"]),
            f"{of['accuracy']:.2f}",
            f"{of['weight']:.2f}",
            f"{of['ties']:.2f}",
            "" if of["median_seconds"] is None else f"{of['median_seconds']:.0f} s",
            "" if of["controls_passed"] is None else f"{of['controls_passed']:.2f} of {of['controls']}",
        ]
        for name, of in figures["annotators"].items()
    ]
    heads = [
        "annotator",
        "labels",
        "agreement with others",
        "accuracy (Dawid-Skene)",
        "weight",
        "ties",
        "time",
        "controls",
    ]
    return {"title": "Annotators", "heads": heads, "rows": rows}


def _biases(figures: dict[str, Any]) -> dict[str, Any]:
    rows = [
        [name, TRAITS[trait], str(bias.share), str(bias.above_others), f"{bias.pairs:,}"]
        for name, of in figures["annotators"].items()
        for trait, bias in of["biases"].items()
        if bias.pairs
    ]
    heads = ["annotator", "trait", "share of decided pairs", "above the others (position: above 1/2)", "pairs"]
    return {"title": "Biases", "heads": heads, "rows": rows}


def _groups(figures: dict[str, Any], what: str, head: str) -> dict[str, Any]:
    groups = figures[what]
    columns = ["agreement", "alpha_nominal" if what == "categories" else "alpha_ordinal"]
    count = "pairs" if what == "categories" else "scores"
    rows = [[name, f"{of[count]:,}", *(str(of[column]) for column in columns)] for name, of in groups.items()]
    return {"title": what.capitalize(), "heads": [head, count, *(NAMES[c] for c in columns)], "rows": rows}


def _two_by_two(figures: dict[str, Any]) -> dict[str, Any]:
    rows = [
        [two["first"], two["second"], f"{two['pairs']:,}", str(two["kappa"]), _number(two["kappa_linear"])]
        for two in figures["two_by_two"]
    ]
    heads = ["annotator", "annotator", "pairs", "Cohen's kappa", "with linear weights"]
    return {"title": "Two by two", "heads": heads, "rows": rows}


def _sources(figures: dict[str, Any]) -> dict[str, Any]:
    ranked = sorted(figures["sources"].items(), key=lambda item: -item[1])
    rows = [[name, f"{strength:+.3f}"] for name, strength in ranked]
    return {"title": "Who wrote them", "heads": ["source", "Plackett-Luce log-strength"], "rows": rows}


def _figures(figures: dict[str, Any]) -> list[tuple[str, str | None, str]]:
    annotators = figures["annotators"]
    agreements = [(name, of["agreement_with_others"]) for name, of in annotators.items()]
    overall = figures["overall"]["agreement"].value
    shown = [
        (
            "Agreement with the others",
            intervals([("share of judgements that agree", agreements, overall)]),
            "The line is the agreement of the whole label set.",
        )
    ]
    drawn = [
        (TRAITS[trait], [(name, of["biases"][trait].above_others) for name, of in annotators.items()], 0.0)
        for trait in TRAITS
    ]
    caption = "Above the others on the same pairs; of position above one half. An interval across 0 shows no bias."
    shown.append(("Biases", intervals(drawn), caption))
    groups = [(name, of["alpha_nominal"]) for name, of in figures["categories"].items()]
    shown.append(
        ("Categories", intervals([("Krippendorff's alpha, nominal", groups, 0.0)]), "0 is chance, 1 is agreement.")
    )
    return shown


def intervals(drawn: Sequence[tuple[str, Sequence[tuple[str, Interval]], float]]) -> str | None:
    """Small panels of values with their intervals, a line for each name; None where nothing is defined.

    Args:
        drawn: title, names with values, and where the reference line stands.
    """
    defined = [
        (title, [(name, value) for name, value in values if not np.isnan(value.value)][:MOST_ROWS], line)
        for title, values, line in drawn
    ]
    defined = [panel for panel in defined if panel[1]]
    if not defined:
        return None
    longest = max(len(values) for _, values, _ in defined)
    with panels(3.6 * len(defined) + 1.2, 0.26 * longest + 1.0, len(defined)) as (figure, axes):
        for ax, (title, values, line) in zip(axes, defined, strict=True):
            ax.axvline(line, color=GREY, linewidth=1, linestyle="--")
            for place, (_, (value, low, high)) in enumerate(values):
                if not np.isnan(low):
                    apart = low > line or high < line
                    ax.plot([low, high], [place, place], color=ORANGE if apart else BLUE, linewidth=1.6)
                ax.plot(value, place, "o", color=BLUE, markersize=5)
            ax.set_yticks(range(len(values)), [text(name)[:40] for name, _ in values])
            ax.set_ylim(len(values) - 0.4, -0.6)
            ax.set_title(title, fontsize=9)
        return as_svg(figure)


def _number(value: float) -> str:
    return "not defined" if np.isnan(value) else f"{value:.3f}"
