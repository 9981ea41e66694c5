"""The figures of the page, as SVG."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lit_align.report.read import Curve, RunData
from lit_align.utils.display import printable

# Wong 2011, "Points of view: Color blindness": told apart by everybody.
BLUE, ORANGE, GREEN, PURPLE, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#6b7280"
COLOURS = {"base": GREY, "sft": BLUE, "ppo": ORANGE, "dpo": GREEN}

STYLE: Any = {
    "font.family": "sans-serif",
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#9ca3af",
    "axes.labelcolor": "#374151",
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.grid": True,
    "grid.color": "#e5e7eb",
    "grid.linewidth": 0.7,
    "xtick.color": "#6b7280",
    "ytick.color": "#6b7280",
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "lit_align",
}

# Colours of runs over each other (Wong 2011 again), and lines that are told apart in black and white.
RUNS = (BLUE, ORANGE, GREEN, PURPLE, "#E69F00", "#56B4E9", "#000000")
LINES: Any = ("-", "--", "-.", ":")

# What to show of a stage's curves, in this order: metric, title.
PANELS = [
    ("train/loss", "training loss (nats)"),
    ("val/loss", "held-out loss (nats)"),
    ("val/accuracy", "held-out accuracy on pairs"),
    ("train/accuracy", "training accuracy on pairs"),
    ("val/token_accuracy", "held-out accuracy of tokens"),
    ("train/token_accuracy", "training accuracy of tokens"),
    ("train/margin", "training margin"),
    ("train/chosen_logp", "log-prob. of chosen (nats)"),
    ("train/rejected_logp", "log-prob. of rejected (nats)"),
    ("ppo/reward", "reward of rollouts"),
    ("ppo/kl", "KL from the reference (nats)"),
    ("ppo/length", "length of answers (tokens)"),
    ("ppo/entropy", "entropy (nats per token)"),
    ("ppo/clip_fraction", "share of clipped tokens"),
    ("ppo/cut", "share of answers that are cut"),
    ("ppo/groups_without_variance", "share of groups without variance"),
    ("ppo/explained_variance", "explained variance of the value"),
    ("val/gold", "gold reward, held out"),
    ("train/grad_norm", "norm of the gradient"),
    ("train/learning_rate", "learning rate"),
]


@contextmanager
def panels(width: float, height: float, columns: int = 1, rows: int = 1) -> Iterator[tuple[Figure, list[Axes]]]:
    """A figure in the page's style, and its axes, row by row."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def as_svg(figure: Figure) -> str:
    """The figure as SVG for a page; text stays text, and what would command a terminal is escaped."""
    buffer = io.StringIO()
    with mpl.rc_context(STYLE):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    return printable(text[text.index("<svg") :], lines=True)


def curves(stage: str, metrics: dict[str, Curve]) -> str | None:
    """Small multiples of a stage's metrics; None if it has none of those known here."""
    shown = [(name, title) for name, title in PANELS if name in metrics and metrics[name][0]]
    if not shown:
        return None
    columns = min(len(shown), 4)
    rows = -(-len(shown) // columns)
    with panels(3.1 * columns, 2.2 * rows, columns, rows) as (figure, axes):
        for ax, (name, title) in zip(axes, shown, strict=False):
            steps, values = metrics[name]
            colour = COLOURS.get(stage, BLUE)
            _line(ax, steps, values, color=colour)
            ax.set_title(title)
            ax.set_xlabel("optimizer step" if not name.startswith(("ppo", "val")) else "step")
        for ax in axes[len(shown) :]:
            ax.remove()
        return as_svg(figure)


def _line(ax: Axes, steps: list[float], values: list[float], **style: Any) -> None:
    """A curve: a point where there is one, and a mean over the noise where there are many."""
    noisy = len(values) > 60
    faint: dict[str, Any] = (
        {**style, "linewidth": 0.8, "alpha": 0.3, "label": None} if noisy else {"linewidth": 1.6, **style}
    )
    point: dict[str, Any] = {"marker": "o", "markersize": 4} if len(values) == 1 else {}
    ax.plot(steps, values, **faint, **point)
    if noisy:
        smooth: dict[str, Any] = {"linewidth": 1.6, **style}
        ax.plot(steps, _smooth(values), **smooth)


def overlaid(series: Sequence[tuple[str, dict[str, Curve]]], most: int = 24) -> str | None:
    """Small multiples, one for a metric, with a line for each run; None if no metric is known.

    Args:
        series: name of each run, and its metrics.
        most: metrics that are shown; those of `PANELS` come first.
    """
    titles = dict(PANELS)
    every = dict.fromkeys(name for _, metrics in series for name in metrics)
    chosen = [*(name for name in titles if name in every), *(name for name in every if name not in titles)][:most]
    if not chosen:
        return None
    columns = min(len(chosen), 3)
    rows = -(-len(chosen) // columns)
    legend = 0.25 * -(-len(series) // 3) + 0.2
    with panels(3.6 * columns, 2.3 * rows + legend, columns, rows) as (figure, axes):
        for ax, name in zip(axes, chosen, strict=False):
            for number, (_, metrics) in enumerate(series):
                if name in metrics:
                    style = LINES[(number + number // len(RUNS)) % len(LINES)]
                    _line(ax, *metrics[name], color=RUNS[number % len(RUNS)], linestyle=style)
            ax.set_title(text(titles.get(name, name)))
            ax.set_xlabel("step")
        for ax in axes[len(chosen) :]:
            ax.remove()
        handles = [
            Line2D([], [], color=RUNS[n % len(RUNS)], linestyle=LINES[(n + n // len(RUNS)) % len(LINES)], linewidth=1.8)
            for n in range(len(series))
        ]
        names = [text(name) for name, _ in series]
        figure.legend(handles, names, loc="outside upper left", ncols=min(len(series), 3), fontsize=9, handlelength=3.4)
        return as_svg(figure)


def text(name: str) -> str:
    """A name as matplotlib shows it: dollar signs begin no formula, control characters are escaped."""
    return printable(name).replace("$", r"\$")


def _smooth(values: list[float], weight: float = 0.9) -> list[float]:
    """Exponential moving average without the bias of its start."""
    smoothed, running, norm = [], 0.0, 0.0
    for value in values:
        running, norm = weight * running + (1 - weight) * value, weight * norm + (1 - weight)
        smoothed.append(running / norm)
    return smoothed


def reward_against_kl(run: RunData) -> str | None:
    """Gold and proxy reward against KL: the path of each PPO stage, and where every policy ended."""
    paths = {s: c for s, c in run.curves.items() if {"val/kl", "val/gold", "val/reward"} <= set(c)}
    if not paths:
        return None
    columns = min(len(paths), 2)
    rows = -(-len(paths) // columns)
    with panels(5.2 * columns, 3.6 * rows, columns, rows) as (figure, axes):
        for ax, (stage, metrics) in zip(axes, paths.items(), strict=False):
            kl = metrics["val/kl"][1]
            for name, label, colour in (("val/reward", "proxy: the reward model", GREY), ("val/gold", "gold", ORANGE)):
                ax.plot(
                    kl, metrics[name][1], "o-", color=colour, markersize=3, linewidth=1.4, label=f"{stage}, {label}"
                )
            _mark_policies(ax, run.summary, stage)
            ax.set_xlabel("KL from SFT (nats per answer)")
            ax.set_ylabel("mean reward")
            ax.set_title(f"{stage}, held-out prompts")
            ax.legend(fontsize=8)
        for ax in axes[len(paths) :]:
            ax.remove()
        return as_svg(figure)


def _mark_policies(ax: Axes, summary: dict[str, float], stage: str) -> None:
    for policy in ("sft", "dpo", stage):
        kl, gold = summary.get(f"{policy}/kl"), summary.get(f"{policy}/gold_reward")
        if kl is None or gold is None:
            continue
        ax.errorbar(
            kl, gold, yerr=1.96 * summary.get(f"{policy}/gold_reward_se", 0.0), fmt="D", markersize=5,
            color=COLOURS.get(policy, ORANGE), capsize=2,
        )  # fmt: skip
        ax.annotate(policy, (kl, gold), textcoords="offset points", xytext=(6, -10), fontsize=8, color="#374151")


def behaviour(summary: dict[str, float], policies: list[str], measures: dict[str, str]) -> str | None:
    """Shares of a kind of behaviour, side by side for every policy."""
    shown = {key: title for key, title in measures.items() if all(f"{p}/{key}" in summary for p in policies)}
    if not shown or not policies:
        return None
    # Bars that lie on their side have room for the names of many policies.
    many = len(policies) > 6
    columns = min(len(shown), 3) if many else len(shown)
    rows = -(-len(shown) // columns)
    width, height = (3.4 * columns, (0.2 * len(policies) + 0.5) * rows) if many else (1.9 * columns + 0.6, 2.6)
    with panels(width, height, columns, rows) as (figure, axes):
        for ax, (key, title) in zip(axes, shown.items(), strict=False):
            values = [summary[f"{policy}/{key}"] for policy in policies]
            colours = [COLOURS.get(policy, PURPLE) for policy in policies]
            bars = (ax.barh if many else ax.bar)(policies, values, 0.7, color=colours)
            ax.bar_label(bars, fmt="%.2f", fontsize=8, color="#374151", padding=2)
            ax.set_title(title, fontsize=9)
            ax.grid(visible=False)
            if many:
                ax.set_xlim(0, 1.12)
                ax.invert_yaxis()
            else:
                ax.set_ylim(0, 1.12)
            ax.tick_params(axis="y" if many else "x", labelsize=8, rotation=35 if 4 < len(policies) <= 6 else 0)
            (ax.set_xticks if many else ax.set_yticks)([])
            ax.spines["bottom" if many else "left"].set_visible(False)
        for ax in axes[len(shown) :]:
            ax.remove()
        return as_svg(figure)


def durations(summary: dict[str, float]) -> str | None:
    """Seconds of each stage."""
    seconds: dict[str, Any] = {k[:-8]: v for k, v in summary.items() if k.endswith("/seconds")}
    if not seconds:
        return None
    with panels(6.4, 0.28 * len(seconds) + 0.6) as (figure, (ax,)):
        bars = ax.barh(list(seconds), list(seconds.values()), color=GREY, height=0.65)
        ax.bar_label(bars, fmt="%.0f s", fontsize=8, padding=3, color="#374151")
        ax.invert_yaxis()
        ax.grid(visible=False)
        ax.set_xticks([])
        ax.spines["bottom"].set_visible(False)
        ax.margins(x=0.12)
        return as_svg(figure)


def sweep_parameters(sweep: dict[str, Any]) -> str | None:
    """A sweep's metric against each parameter that takes more than one value."""
    points = [point for point in sweep.get("points", []) if point["metric"] is not None]
    shown = {key: name for key, name in sweep.get("names", {}).items() if len({_of(p, key) for p in points}) > 1}
    if not shown:
        return None
    columns = min(len(shown), 4)
    rows = -(-len(shown) // columns)
    with panels(3.1 * columns, 2.6 * rows, columns, rows) as (figure, axes):
        for ax, (key, name) in zip(axes, shown.items(), strict=False):
            numbers = [_as_number(point["parameters"][key]) for point in points]
            known = [number for number in numbers if number is not None]
            texts = len(known) < len(numbers)
            # By name where they are no numbers, sorted, so that the page does not depend on who came first.
            order = sorted({_of(point, key) for point in points})
            xs = [order.index(_of(point, key)) for point in points] if texts else known
            ax.scatter(xs, [point["metric"] for point in points], s=22, color=[ORANGE] + [BLUE] * (len(points) - 1))
            if texts:
                ax.set_xticks(range(len(order)), order)
            elif min(known) > 0 and max(known) / min(known) >= 20:
                ax.set_xscale("log")
            ax.set_title(name)
            ax.set_ylabel(sweep["metric"] if ax is axes[0] else "")
        for ax in axes[len(shown) :]:
            ax.remove()
        return as_svg(figure)


def sweep_curves(run: RunData) -> str | None:
    """A sweep's metric over steps, a line for each run."""
    name = run.sweep.get("metric", "")
    folders = [point["folder"] for point in run.sweep.get("points", []) if name in run.curves.get(point["folder"], {})]
    if not folders:
        return None
    with panels(6.4, 3.2) as (figure, (ax,)):
        for folder in reversed(folders):  # the best on top
            steps, values = run.curves[folder][name]
            best = folder == folders[0]
            ax.plot(steps, values, "o-", markersize=2.5, color=ORANGE if best else GREY, alpha=1.0 if best else 0.45)
        ax.set_xlabel("step")
        ax.set_ylabel(name)
        return as_svg(figure)


def _of(point: dict[str, Any], key: str) -> str:
    return str(point["parameters"][key])


def _as_number(value: Any) -> float | None:
    """Of numbers, and of texts that are some, such as YAML's 1e-5; not of true and false."""
    try:
        return None if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        return None
