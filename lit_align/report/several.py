"""Several runs on one page: over each other, with the settings that differ, last figures and answers side by side."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from lit_align.report import figures
from lit_align.report.read import RunData

# Where a run writes and where it was taken up from are no settings.
_PLACES = ("out", "config", "ckpt_path", "weights_only", "checkpoint.dirpath", "trainer.default_root_dir")
_MOST = 24  # panels


def comparison(runs: Sequence[RunData]) -> dict[str, Any]:
    """Everything the page of several runs shows."""
    names = labels([run.folder for run in runs])
    series = [
        (name if len(run.curves) == 1 else f"{name}/{stage}", metrics)
        for name, run in zip(names, runs, strict=True)
        for stage, metrics in run.curves.items()
    ]
    shown = figures.overlaid(series, _MOST)
    tables = [_states(names, runs), _settings(names, runs), _last(series)]
    return {
        "title": f"lit_align: {len(runs)} runs",
        "subtitle": ", ".join(names),
        "notes": [f"{name}: {run.note}" for name, run in zip(names, runs, strict=True) if run.note],
        "tables": [table for table in tables if table["rows"]],
        # Safe: matplotlib wrote it, and it escapes the text it is given.
        "sections": [{"title": "Over each other", "figures": [{"svg": Markup(shown)}]}] if shown else [],
        "answers": _answers(names, runs),
    }


def labels(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of paths that tell folders apart."""
    whole = [folder.resolve().parts for folder in folders]
    for depth in range(1, max(map(len, whole)) + 1):
        names = [os.sep.join(parts[-depth:]) for parts in whole]
        if len(set(names)) == len(set(whole)):
            break
    # A folder that is given twice is two columns of one name.
    return names


def flat(config: Any, prefix: str = "") -> dict[str, str]:
    """Values by their dotted keys, as on the command line; without places and without `init_args`."""
    if isinstance(config, dict) and config:
        found: dict[str, str] = {}
        for key, value in config.items():
            inner = prefix if key == "init_args" else f"{prefix}.{key}" if prefix else str(key)
            found |= flat(value, inner) if inner not in _PLACES else {}
        return found
    if isinstance(config, list) and any(isinstance(item, dict | list) for item in config):
        return {k: v for i, item in enumerate(config) for k, v in flat(item, f"{prefix}.{i}").items()}
    return {prefix: str(config)}


def _states(names: Sequence[str], runs: Sequence[RunData]) -> dict[str, Any]:
    rows = []
    for name, run in zip(names, runs, strict=True):
        steps = max((values[0][-1] for metrics in run.curves.values() for values in metrics.values()), default=None)
        method = str((run.config.get("model") or {}).get("class_path") or "").rpartition(".")[-1]
        method = method or ", ".join(run.curves)
        rows.append([name, method, "" if steps is None else f"{steps + 1:,.0f}", run.note or "ended"])
    return {"title": "Runs", "heads": ["run", "method or stages", "steps", "state"], "rows": rows, "note": ""}


def _settings(names: Sequence[str], runs: Sequence[RunData]) -> dict[str, Any]:
    values = [flat(run.config) if run.config else {} for run in runs]
    keys = list(dict.fromkeys(key for told in values for key in told))
    rows = [
        [key, *(told.get(key, "") for told in values)]
        for key in keys
        if len({told.get(key, "") for told in values}) > 1
    ]
    return {"title": "Settings that differ", "heads": ["setting", *names], "rows": rows, "note": ""}


def _last(series: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    keys = sorted({key for _, metrics in series for key in metrics}, key=lambda key: (not key.startswith("val/"), key))
    rows = [[key, *(f"{m[key][1][-1]:.4g}" if key in m else "" for _, m in series)] for key in keys]
    return {"title": "Last figures", "heads": ["metric", *(name for name, _ in series)], "rows": rows, "note": ""}


def _answers(names: Sequence[str], runs: Sequence[RunData]) -> dict[str, Any] | None:
    """The latest answers of each run to the prompts that any of them was asked."""
    latest = [latest_answers(run) for run in runs]
    prompts = list(dict.fromkeys(prompt for told in latest for prompt in told))
    rows = [[prompt, *(told.get(prompt, "") for told in latest)] for prompt in prompts[:24]]
    return {"heads": ["prompt", *names], "rows": rows} if rows else None


def latest_answers(run: RunData) -> dict[str, str]:
    """Of each prompt the last answer: what was said after validations, and the samples of a pipeline's policies."""
    lines = sorted(run.said, key=lambda line: line.get("step", 0)) or run.samples
    return {
        str(line["prompt"]): str(line["answer"]) + ("" if line.get("finished", True) else " …")
        for line in lines
        if "prompt" in line and "answer" in line
    }
