"""What a run left behind, read back for the page."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lit_align import limits

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
    """

    folder: Path
    summary: dict[str, float] = field(default_factory=dict)
    manifest: dict[str, Any] = field(default_factory=dict)
    curves: dict[str, dict[str, Curve]] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)
    sweep: dict[str, Any] = field(default_factory=dict)


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
    stages = [folder] if (folder / "metrics.csv").exists() else sorted(folder.glob("*/"), key=_age)
    for stage in stages:
        limits.check_folder(stage)
        if (stage / "metrics.csv").exists():
            run.curves[stage.name] = read_curves(stage / "metrics.csv")
        if (stage / "samples.jsonl").exists():
            run.samples += [json.loads(line) for line in (stage / "samples.jsonl").read_text().splitlines()]
    if not run.curves and not run.summary:
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
                if name not in ("step", "epoch") and value:
                    steps, values = curves.setdefault(name, ([], []))
                    steps.append(float(row["step"]))
                    values.append(float(value))
    return curves


def _json(path: Path) -> dict[str, Any]:
    return limits.read_json(path) if path.exists() else {}


def _age(stage: Path) -> float:
    files = [stage / name for name in ("stage.yaml", "config.yaml")]
    return min((file.stat().st_mtime for file in files if file.exists()), default=float("inf"))
