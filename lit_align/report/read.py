"""What a run left behind, read back for the page."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lit_align.utils import limits

Curve = tuple[list[float], list[float]]  # steps, values


@dataclass
class RunData:
    """A pipeline's folder, or a sweep's.

    Attributes:
        folder: where it lies.
        summary: figures by name.
        manifest: versions, commit, seed, stages and their parents.
        curves: for each stage that trained, its metrics over steps.
        samples: answers of each policy to the same prompts, with their scores.
        sweep: what its points differ in, and came to.
        said: answers to the prompts of a `CompletionsTable`, with the step they were given at.
        config: of a single run.
        evaluations: results of `lit-align evaluate` in the folder or in a folder of it: title, notes, tables.
        note: what is missing of a run that has not ended; empty of one that has.
    """

    folder: Path
    summary: dict[str, float] = field(default_factory=dict)
    manifest: dict[str, Any] = field(default_factory=dict)
    curves: dict[str, dict[str, Curve]] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)
    sweep: dict[str, Any] = field(default_factory=dict)
    said: list[dict[str, Any]] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    note: str = ""


def read_run(folder: Path) -> RunData:
    """Read what there is.

    Raises:
        ValueError: neither a pipeline's folder nor a sweep's nor a single run's.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder")
    limits.check_folder(folder)
    run = RunData(folder, _json(folder / "summary.json"), _json(folder / "manifest.json"))
    run.sweep = _json(folder / "sweep.json")
    results = [folder / "evaluation.json", *sorted(folder.glob("*/evaluation.json"))]
    run.evaluations = [told for file in results if (told := _json(file)).get("tables")]
    stages = [folder] if (folder / "metrics.csv").exists() else sorted(folder.glob("*/"), key=_age)
    for stage in stages:
        limits.check_folder(stage)
        if (stage / "metrics.csv").exists():
            run.curves[stage.name] = read_curves(stage / "metrics.csv")
        if (stage / "samples.jsonl").exists():
            run.samples += _lines(stage / "samples.jsonl")
    run.said = _lines(folder / "said.jsonl")
    run.config = _yaml(folder / "config.yaml")
    run.note = _unfinished(run)
    if not run.curves and not run.summary and not run.evaluations and not run.note:
        raise ValueError(f"{folder} holds no run: expected summary.json, or metrics.csv in it or in its folders")
    return run


def read_curves(path: Path) -> dict[str, Curve]:
    """Each metric with the steps it was logged at."""
    curves: dict[str, Curve] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            if not (row.get("step") or "").isdigit():
                continue
            for name, value in row.items():
                number = None if name in ("step", "epoch") or not value else _number(value)
                if number is not None:
                    steps, values = curves.setdefault(name, ([], []))
                    steps.append(float(row["step"]))
                    values.append(number)
    return curves


def _number(value: Any) -> float | None:
    """None of what is no number: half a line that a killed process left."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def _unfinished(run: RunData) -> str:
    """What is missing of a run, or of a pipeline's stages; empty where nothing is."""
    begun = [stage.name for stage in run.folder.glob("*/") if (stage / "stage.json").exists()]
    open_stages = [name for name in begun if not (run.folder / name / "done.json").exists()]
    if open_stages:
        return f"stage {', '.join(sorted(open_stages))} has not ended: it is still going, or has failed"
    if (run.folder / "model").exists() or run.summary:
        return ""
    trained = [steps[-1] for metrics in run.curves.values() for name, (steps, _) in metrics.items() if _trains(name)]
    if trained and (run.folder / "config.yaml").exists():
        return f"has not ended: it is still going, or has failed; {max(trained) + 1:,.0f} steps are logged"
    if run.config and not run.curves:
        return "has logged no step yet: it is still at its start, or has failed there"
    return ""


def _trains(name: str) -> bool:
    return name.startswith(("train/", "ppo/"))


def _lines(path: Path) -> list[dict[str, Any]]:
    """Rows of jsonl, without half a line at the end."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return [row for row in rows if isinstance(row, dict)]


def _yaml(path: Path) -> dict[str, Any]:
    content = limits.load_yaml(limits.read_text(path), path) if path.exists() else None
    return content if isinstance(content, dict) else {}


def _json(path: Path) -> dict[str, Any]:
    return limits.read_json(path) if path.exists() else {}


def _age(stage: Path) -> float:
    files = [stage / name for name in ("stage.yaml", "config.yaml")]
    return min((file.stat().st_mtime for file in files if file.exists()), default=float("inf"))
