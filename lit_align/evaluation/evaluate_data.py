"""`lit-align evaluate data`: the cards of data sets side by side, and how far they overlap."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from lit_align.data.rows import Tally
from lit_align.data.source import Source, as_sources, labels
from lit_align.evaluation.data_card import Told, as_told, data_card, overlaps
from lit_align.evaluation.intervals import Interval
from lit_align.evaluation.length import words
from lit_align.evaluation.results import Result, check_free, number, table
from lit_align.report.figures import BLUE, GREEN, GREY, ORANGE, as_svg, panels, text

# Measure, how it is called.
SHARES = {
    "lists": "with a list",
    "code": "with code",
    "references": "with a reference",
    "refusals": "that refuse",
    "good_labels": "judged good, of single ones",
}
PREFERENCES = {
    "longer_preferred": "longer answer preferred",
    "better_comes_first": "better answer comes first (1 where the format says chosen)",
    "annotators_agree": "two annotators agree",
    "annotator_with_majority": "one annotator with the majority",
}
COUNTS = {
    "rows": "rows",
    "different_prompts": "different prompts",
    "answers": "answers",
    "repeated_rows": "rows that repeat another",
    "empty_answers": "empty answers",
    "pairs": "pairs",
    "ties": "pairs that tie",
    "identical_answers": "pairs of identical answers",
    "skipped": "rows that cannot be read",
    "rows_with_nothing_to_learn": "rows with nothing to learn",
}


class EvaluateData:
    """Describes instruction and preference sets: a command, and a `call` stage of a pipeline.

    Args:
        sources: the sets; a training and a validation set side by side show what they share.
        resamples: of the bootstrap over prompts.
        seed: of the resampling.
    """

    def __init__(self, sources: list[Source], resamples: int = 1000, seed: int = 0) -> None:
        self.sources = as_sources(sources) or []
        self.resamples, self.seed = resamples, seed
        if not self.sources:
            raise ValueError("evaluate data needs at least one source")

    def run(self, out: Path) -> dict[str, float]:
        """Write the results into a folder; return the numbers."""
        check_free(out)
        names = labels(self.sources)
        sets: list[list[Told]] = []
        cards: dict[str, dict[str, Any]] = {}
        notes: list[str] = []
        for name, source in zip(names, self.sources, strict=True):
            tally = Tally()
            rows = tqdm(source.read("skip", tally), desc=f"reading {name}", unit=" rows")
            sets.append([as_told(row) for _, row in rows])
            if not sets[-1]:
                raise ValueError(f"{source.name} holds no usable row: {tally}")
            cards[name] = {**data_card(sets[-1], self.resamples, self.seed)}
            cards[name] |= {key: tally[key] for key in ("skipped", "rows_with_nothing_to_learn")}
            if tally.first_skipped:
                notes.append(f"{name}: {tally['skipped']:,} rows cannot be read; the first: {tally.first_skipped}")
        shared = overlaps(sets)
        notes += [
            f"{round(shared[i][j] * len(sets[i])):,} of {len(sets[i]):,} rows of {names[i]} have a prompt that "
            f"{names[j]} holds, too."
            for i in range(len(names))
            for j in range(len(names))
            if i != j and shared[i][j] > 0
        ]
        figures = {"sources": cards, "overlap": dict(zip(names, shared, strict=True)), "seed": self.seed}
        subtitle = f"{', '.join(source.name for source in self.sources)}; intervals are of 95 %, over prompts"
        title = f"data: {', '.join(names)}"
        drawings = [draw_data(names, cards, sets)]
        return Result("data", title, subtitle, figures, notes, tables(names, cards, shared), drawings).write(out)


def tables(names: Sequence[str], cards: dict[str, dict[str, Any]], shared: list[list[float]]) -> list[dict[str, Any]]:
    """Counts, lengths, shares, preferences, overlap; a column for each set."""

    def rows(measures: dict[str, str]) -> list[list[Any]]:
        return [
            [what, *(_cell(cards[name].get(key)) for name in names)]
            for key, what in measures.items()
            if any(cards[name].get(key) for name in names)
        ]

    lengths = [
        [f"{what}, {statistic}", *(number(cards[name][key][statistic], 1) for name in names)]
        for key, what in (("prompt_words", "words of a prompt"), ("answer_words", "words of an answer"))
        for statistic in ("mean", "median", "p95", "longest")
    ]
    shown = [
        table("Counts", ["", *names], rows(COUNTS)),
        table("Lengths", ["", *names], lengths),
        table("Share of answers", ["", *names], rows(SHARES)),
        table("Preferences", ["", *names], rows(PREFERENCES)),
    ]
    if len(names) > 1:
        cells = [[name, *(f"{value:.3f}" for value in row)] for name, row in zip(names, shared, strict=True)]
        shown.append(table("Share of the row's prompts that the column's set holds", ["", *names], cells))
    return [one for one in shown if one["rows"]]


def _cell(value: Any) -> str:
    return "" if value is None else number(value)


def draw_data(
    names: Sequence[str], cards: dict[str, dict[str, Any]], sets: Sequence[Sequence[Told]]
) -> tuple[str, str, str, str]:
    """Lengths of answers, and shares."""
    shares = {**SHARES, "longer_preferred": PREFERENCES["longer_preferred"]}
    shown = {key: what for key, what in shares.items() if any(cards[name].get(key) for name in names)}
    with panels(9.6, 0.34 * max(len(names) * 1.2, len(shown)) + 1.6, 2) as (figure, (lengths, bars)):
        counts = [[max(words(answer), 1) for row in rows for answer in row.answers] or [1] for rows in sets]
        lengths.boxplot(counts, orientation="horizontal", whis=(5, 95), showfliers=False, medianprops={"color": ORANGE})
        lengths.set_yticks(range(1, len(names) + 1), [text(name)[:30] for name in names])
        lengths.invert_yaxis()
        lengths.set_xscale("log")
        lengths.set_xlabel("words of an answer (5, 25, 50, 75, 95 %)")
        lengths.set_title("length")
        marks = ("o", "s", "^", "D", "v", "P", "X")
        for number_, name in enumerate(names):
            colour = (BLUE, ORANGE, GREEN, GREY)[number_ % 4]
            for place, key in enumerate(shown):
                value = cards[name].get(key)
                if not isinstance(value, Interval) or np.isnan(value.value):
                    continue
                y = place + 0.14 * (number_ - (len(names) - 1) / 2)
                bars.plot([value.low, value.high], [y, y], color=colour, linewidth=1.5)
                label = text(name) if place == 0 else None
                bars.plot(value.value, y, marks[number_ % len(marks)], color=colour, markersize=4.5, label=label)
        bars.set_yticks(range(len(shown)), list(shown.values()))
        bars.invert_yaxis()
        bars.set_xlim(-0.02, 1.02)
        bars.axvline(0.5, color=GREY, linewidth=1, linestyle="--")
        bars.set_title("shares")
        figure.legend(loc="outside lower center", ncols=min(len(names), 4), fontsize=8)
        caption = "Left: lengths of answers on a logarithmic scale. Right: shares of answers; the last row is of pairs."
        return "data", "Lengths and shares", as_svg(figure), caption
