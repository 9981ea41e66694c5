"""What an evaluation leaves: JSON, a page with its figures, and a table in the terminal."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from markupsafe import Markup
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lit_align import __version__
from lit_align.evaluation.intervals import Interval, plain
from lit_align.report import write_page
from lit_align.utils.disk import write_whole
from lit_align.utils.display import printable, say
from lit_align.utils.owned import check_report


@dataclass
class Result:
    """What is written and shown.

    Attributes:
        kind: reward, policy or data.
        title: of the page.
        subtitle: what was measured, and how intervals are made.
        figures: everything measured, by name.
        notes: what a reader must know: what was left out, and why.
        tables: title, heads and rows of cells.
        drawings: name of a file, heading, SVG, caption.
    """

    kind: str
    title: str
    subtitle: str
    figures: dict[str, Any]
    notes: list[str] = field(default_factory=list)
    tables: list[dict[str, Any]] = field(default_factory=list)
    drawings: list[tuple[str, str, str, str]] = field(default_factory=list)

    def write(self, out: Path) -> dict[str, float]:
        """Write `evaluation.json`, `report.html` and `figures/*.svg`; print the tables; return the numbers, flat.

        Raises:
            FileExistsError: the folder holds a page or a result that lit_align did not write.
        """
        check_free(out)
        told: dict[str, Any] = {"lit_align": __version__, "kind": self.kind, "title": self.title}
        told |= {"notes": self.notes, "tables": self.tables}
        write_whole(out / "evaluation.json", json.dumps(plain({**told, **self.figures}), indent=1) + "\n")
        for name, _, svg, _ in self.drawings:
            write_whole(out / "figures" / f"{name}.svg", _standing(svg))
        write_page(out / "report.html", self.page())
        self.show()
        say(f"figures in {out / 'evaluation.json'}, page in {out / 'report.html'}")
        return flat(self.figures)

    def page(self) -> dict[str, Any]:
        """What `report/page.html` shows."""
        return {
            "title": f"lit_align: {self.title}",
            "subtitle": self.subtitle,
            "notes": self.notes,
            "tables": self.tables,
            "sections": [
                {"title": heading, "figures": [{"svg": Markup(svg), "caption": caption}]}
                for _, heading, svg, caption in self.drawings
            ],
        }

    def show(self) -> None:
        """Print notes and tables."""
        console = Console()
        console.print(Text(printable(f"{self.title}: {self.subtitle}")), soft_wrap=True)
        for note in self.notes:
            console.print(Text(printable(f"note: {note}"), style="yellow"), soft_wrap=True)
        for told in self.tables:
            for columns in _fitting(told, console.width):
                table = Table(title=Text(printable(told["title"])), title_justify="left")
                for column in columns:
                    justify: Any = "right" if column else "left"
                    table.add_column(Text(printable(told["heads"][column])), overflow="fold", justify=justify)
                for row in told["rows"]:
                    table.add_row(*(Text(printable(row[column])) for column in columns))
                console.print(table)


def check_free(out: Path) -> None:
    """Refuse a folder whose files would be written over and are not an evaluation's.

    Raises:
        FileExistsError: names the file, and the way out.
    """
    check_report(out / "report.html")
    file = out / "evaluation.json"
    if file.exists():
        try:
            ours = "lit_align" in json.loads(file.read_text())
        except (ValueError, TypeError):
            ours = False
        if not ours:
            raise FileExistsError(f"{file} was not written by lit-align, and would be: choose another --out")


def flat(figures: dict[str, Any], before: str = "") -> dict[str, float]:
    """Numbers of nested figures, under names with slashes; an interval gives its value, and ends _low and _high."""
    found: dict[str, float] = {}
    for name, value in figures.items():
        key = f"{before}{name}"
        if isinstance(value, Interval):
            ends = {key: value.value, f"{key}_low": value.low, f"{key}_high": value.high}
            found |= {end: float(number) for end, number in ends.items() if not math.isnan(number)}
        elif isinstance(value, dict):
            found |= flat(value, f"{key}/")
        elif isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
            found[key] = float(value)
    return found


def number(value: float | Interval | None, digits: int = 3) -> str:
    """A number as tables show it, an interval with its ends."""
    if isinstance(value, Interval):
        ends = "" if math.isnan(value.low) else f" [{number(value.low, digits)}, {number(value.high, digits)}]"
        return number(value.value, digits) + ends
    if value is None or math.isnan(value):
        return "not defined"
    return f"{value:,}" if isinstance(value, int) else f"{value:.{digits}f}"


def count(interval: Interval | None) -> str:
    """How many observations an interval rests on."""
    return "" if interval is None else f"{interval.observations:,}"


def short(name: str) -> str:
    """The end of a path that tells models and data sets apart; of a run's `model` folder, with the run."""
    parts = [part for part in name.split("/") if part]
    if not parts:
        return name
    return "/".join(parts[-2:]) if parts[-1] == "model" else parts[-1]


def table(title: str, heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> dict[str, Any]:
    """A table of texts, numbers and intervals."""
    cells = [[cell if isinstance(cell, str) else number(cell) for cell in row] for row in rows]
    return {"title": title, "heads": list(heads), "rows": cells}


def _fitting(told: dict[str, Any], width: int) -> list[list[int]]:
    """Columns of a table in parts that a terminal is wide enough for, each behind the first column."""
    rows = [told["heads"], *told["rows"]]
    widths = [max(len(row[column]) for row in rows) + 3 for column in range(len(told["heads"]))]
    parts: list[list[int]] = [[0]]
    for column in range(1, len(widths)):
        if len(parts[-1]) > 1 and sum(widths[c] for c in [*parts[-1], column]) >= width:
            parts.append([0])
        parts[-1].append(column)
    return parts


def _standing(svg: str) -> str:
    """An SVG as a file of its own, white behind it."""
    return '<?xml version="1.0" encoding="utf-8"?>\n' + svg.replace("<svg ", '<svg style="background:#fff" ', 1)
