"""Runs to one self-contained HTML page with figures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, select_autoescape
from markupsafe import Markup

from lit_align.report import figures
from lit_align.report.read import RunData, read_run
from lit_align.report.several import comparison
from lit_align.utils.disk import write_whole
from lit_align.utils.display import printable
from lit_align.utils.owned import check_report

# Measures of a policy: key, title, format, note, and whether more is better (None: neither).
MEASURES: list[tuple[str, str, str, str, bool | None]] = [
    ("gold_reward", "gold reward", "{:+.3f}", "what the answers are worth in truth", True),
    ("content", "content, without the price of words", "{:+.3f}", "right, honest and harmless", True),
    ("reward", "reward model's score", "{:+.3f}", "the proxy that PPO maximises", None),
    ("reward_score", "reward model's score", "{:+.3f}", "the proxy that PPO maximises", None),
    ("kl", "KL from SFT", "{:.2f}", "nats per answer", None),
    ("length", "length", "{:.1f}", "words per answer", None),
    ("tokens", "length", "{:.1f}", "tokens per answer", None),
    ("finished", "answers that stop", "{:.3f}", "", True),
    ("fact_correct", "facts right", "{:.2f}", "held-out facts", True),
    ("arithmetic_correct", "sums right", "{:.2f}", "", True),
    ("list_correct", "lists right", "{:.2f}", "", True),
    ("made_up", "facts made up", "{:.2f}", "about entities that no text describes", False),
    ("harm_refusal", "harmful requests refused", "{:.2f}", "", True),
    ("look_alike_refusal", "look-alikes refused", "{:.2f}", "over-refusal", False),
    ("ece", "expected calibration error", "{:.3f}", "of the word that answers a question of fact", False),
]
SHARES = {
    "harm_refusal": "harm refused",
    "look_alike_refusal": "look-alikes refused",
    "made_up": "facts made up",
    "fact_correct": "facts right",
    "arithmetic_correct": "sums right",
    "list_correct": "lists right",
}


def write_comparison(folders: Sequence[Path], path: Path) -> Path:
    """Write a page of several runs, of pipelines or not.

    Raises:
        ValueError: a folder holds no run; names it.
        FileExistsError: a page of that name is not a report.
    """
    return write_page(path, comparison([read_run(folder) for folder in folders]))


def write_report(folder: Path) -> Path:
    """Write `report.html` into a run's folder; nothing on the page is fetched from elsewhere.

    Raises:
        FileExistsError: a page of that name is not a report.
        OSError: it cannot be written, the disk being full for one; the earlier one is left as it was.
    """
    return write_page(folder / "report.html", content(read_run(folder)))


def write_page(path: Path, shown: dict[str, Any]) -> Path:
    """Write what `page.html` shows to a file; nothing on the page is fetched from elsewhere.

    Args:
        path: the file.
        shown: title, subtitle, notes, tables (title, heads, rows), sections (title, figures of svg and caption), ...

    Raises:
        FileExistsError: a page of that name is not a report.
    """
    environment = Environment(
        loader=PackageLoader("lit_align.report", "."),
        autoescape=select_autoescape(),
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: printable(value, lines=True) if type(value) is str else value,
    )
    page = environment.get_template("page.html").render(**shown)
    check_report(path)
    write_whole(path, page)
    return path


def content(run: RunData) -> dict[str, Any]:
    """Everything the page shows."""
    sample_policies = list(dict.fromkeys(line["policy"] for line in run.samples))
    policies = [name for name in sample_policies or _names(run.summary) if f"{name}/kl" in run.summary]
    return {
        "title": f"lit_align: {run.folder.resolve().name}",
        "subtitle": _subtitle(run),
        "sweep": _sweep(run.sweep),
        "policies": policies,
        "measures": _measures(run.summary, policies),
        "rewards": _rewards(run.summary),
        "sections": _sections(run, policies),
        "samples": _samples(run.samples, sample_policies),
        "sample_policies": sample_policies,
        "score": "gold reward" if run.samples and "gold" in run.samples[0] else "reward",
        "provenance": _provenance(run.manifest),
        "notes": [f"This run {run.note}." if run.curves or run.config else f"{run.note}."] if run.note else [],
        "tables": _evaluations(run),
        "answers": _said(run),
    }


def _evaluations(run: RunData) -> list[dict[str, Any]]:
    """Tables of `lit-align evaluate`, each under the title of its evaluation."""
    return [
        {
            "title": f"{told.get('title', 'evaluation')}: {one.get('title', '')}",
            "heads": [str(head) for head in one.get("heads", ())],
            "rows": [[str(cell) for cell in row] for row in one.get("rows", ())],
        }
        for told in run.evaluations
        for one in told["tables"]
    ]


def _said(run: RunData) -> dict[str, Any] | None:
    """What the model said to the prompts of a `CompletionsTable`, after the first and the last validation."""
    steps = sorted({int(line.get("step", 0)) for line in run.said})
    steps = steps if len(steps) < 3 else [steps[0], steps[-1]]
    answers = {(line.get("prompt"), line.get("step")): line for line in run.said}
    rows = [
        [str(prompt), *(_cell(answers.get((prompt, step)))["text"] for step in steps)]
        for prompt in dict.fromkeys(line.get("prompt") for line in run.said)
    ]
    return {"heads": ["prompt", *(f"step {step}" for step in steps)], "rows": rows} if rows else None


def _names(summary: dict[str, float]) -> list[str]:
    """What was measured (stages, policies, reward models), in the order of the summary."""
    return list(dict.fromkeys(key.split("/")[0] for key in summary if "/" in key))


def _subtitle(run: RunData) -> str:
    parts = []
    if "seconds" in run.summary:
        parts.append(f"{run.summary['seconds']:.0f} s in all")
    if "seed" in run.manifest:
        parts.append(f"seed {run.manifest['seed']}")
    if run.manifest.get("commit"):
        parts.append(f"commit {run.manifest['commit'][:12]}")
    return ", ".join(parts)


def _sweep(sweep: dict[str, Any]) -> dict[str, Any] | None:
    """The points as a table, the best first."""
    if not sweep:
        return None
    rows = []
    for point in sweep["points"]:
        metric = "" if point["metric"] is None else f"{point['metric']:.5g}"
        told = [str(point["parameters"][key]) for key in sweep["names"]]
        rows.append({"cells": [*told, metric, f"{point['seconds']:.0f}"], "note": point.get("error", ""), **point})
    return {"heads": [*sweep["names"].values(), sweep["metric"], "seconds"], "rows": rows, **sweep}


def _measures(summary: dict[str, float], policies: list[str]) -> list[dict[str, Any]]:
    rows = []
    for key, title, form, note, more_is_better in MEASURES:
        values = [summary.get(f"{policy}/{key}") for policy in policies]
        known = [value for value in values if value is not None]
        if len(known) < len(policies) or not known:  # a stage's own metric of the same name is no comparison
            continue
        best = None if more_is_better is None else max(known) if more_is_better else min(known)
        errors = [summary.get(f"{policy}/{key}_se") for policy in policies]
        cells = [
            {"text": _with_error(form, value, error), "best": value is not None and value == best}
            for value, error in zip(values, errors, strict=True)
        ]
        rows.append({"title": title, "cells": cells, "note": note})
    return rows


def _with_error(form: str, value: float | None, error: float | None) -> str:
    if value is None:
        return ""
    return form.format(value) + (f" ± {1.96 * error:.3f}" if error else "")


def _rewards(summary: dict[str, float]) -> list[dict[str, Any]]:
    def number(key: str) -> str:
        return f"{summary[key]:.3f}" if key in summary else ""

    rows = []
    for name in _names(summary):
        if f"{name}/accuracy_low" in summary and f"{name}/shorter_wins" in summary:
            interval = f"{summary[f'{name}/accuracy_low']:.3f} to {summary[f'{name}/accuracy_high']:.3f}"
            gold, meter = number(f"{name}/gold_accuracy"), number(f"{name}/shorter_accuracy")
            rows.append({"name": name, "cells": [number(f"{name}/accuracy"), interval, gold, meter]})
    return rows


def _sections(run: RunData, policies: list[str]) -> list[dict[str, Any]]:
    def shown(svg: str | None, caption: str = "", heading: str = "") -> list[dict[str, Any]]:
        # Safe: matplotlib wrote it, and it escapes the text it is given.
        return [{"svg": Markup(svg), "caption": caption, "heading": heading}] if svg else []

    against = shown(
        figures.reward_against_kl(run),
        "The path of training, measured on the same held-out prompts. Where the grey line climbs and the orange one "
        "does not, the policy is pleasing the reward model and nobody else. Diamonds: the finished policies on all "
        "held-out prompts, with 95 % intervals.",
    )
    shares = shown(figures.behaviour(run.summary, policies, SHARES))
    # A sweep's runs are shown together.
    stages = {} if run.sweep else run.curves
    curves = [
        entry for stage, metrics in stages.items() for entry in shown(figures.curves(stage, metrics), heading=stage)
    ]
    sections = [
        ("The metric against each parameter", shown(figures.sweep_parameters(run.sweep))),
        ("The metric on the way", shown(figures.sweep_curves(run), "The best run is in colour.")),
        ("Reward against KL", against if not run.sweep else []),
        ("Behaviour on held-out prompts", shares),
        ("Training", curves),
        ("Where the time went", shown(figures.durations(run.summary))),
    ]
    return [{"title": title, "figures": entries} for title, entries in sections if entries]


def _samples(samples: list[dict[str, Any]], policies: list[str], each: int = 2) -> list[dict[str, Any]]:
    """A few prompts of every category, with what each policy answered."""
    answers = {(line["policy"], line["prompt"]): line for line in samples}
    chosen: dict[str, list[str]] = {}
    for line in samples:
        prompts = chosen.setdefault(str(line.get("category", "")), [])
        if line["prompt"] not in prompts and len(prompts) < (each if line.get("category") else 12):
            prompts.append(line["prompt"])
    rows = []
    for category, prompts in sorted(chosen.items()):
        for prompt in prompts:
            cells = [_cell(answers.get((policy, prompt))) for policy in policies]
            rows.append({"category": category.replace("_", " "), "prompt": prompt, "answers": cells})
    return rows


def _cell(line: dict[str, Any] | None) -> dict[str, str]:
    if line is None:
        return {"text": "", "score": ""}
    score = line.get("gold", line.get("reward"))
    return {
        "text": line["answer"] + ("" if line.get("finished", True) else " …"),
        "score": f"{score:+.2f}" if score is not None else "",
    }


def _provenance(manifest: dict[str, Any]) -> list[tuple[str, str]]:
    packages = ", ".join(f"{name} {version}" for name, version in manifest.get("packages", {}).items() if version)
    lines = [
        ("pipeline", manifest.get("pipeline")),
        ("sweep", manifest.get("sweep")),
        ("commit", manifest.get("commit")),
        ("packages", packages),
    ]
    return [(name, str(value)) for name, value in lines if value]
