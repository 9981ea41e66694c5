"""Lines that `fit` prints at its end: the last figures, and the model folder."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

from lightning import Trainer

# In order of printing: losses, then the main metric of each method.
_FIGURES = (
    "train/loss", "val/loss", "train/accuracy", "val/accuracy", "ppo/reward", "val/reward", "ppo/kl", "val/kl",
)  # fmt: skip


def ending(trainer: Trainer, out: Path, seconds: float) -> Iterator[str]:
    """Yield the lines for the end of a fit.

    Args:
        trainer: the Trainer after the fit.
        out: folder of the run.
        seconds: duration of the fit in this process.
    """
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    figures = [f"{name} {metrics[name]:.4g}" for name in _FIGURES if math.isfinite(metrics.get(name, math.nan))]
    yield f"{trainer.global_step:,} optimizer steps in {duration(seconds)}: {', '.join(figures) or 'no figures'}"
    model = out / "model"
    if model.is_dir() and not trainer.fast_dev_run:  # type: ignore[attr-defined]
        yield f"model: {model}{_which(model)}"


def duration(seconds: float) -> str:
    """Format a duration: seconds below two minutes, minutes below two hours, else hours."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _which(model: Path) -> str:
    """Step of the exported weights, if they are not the last ones."""
    try:
        told = json.loads((model / "lit_align.json").read_text())
    except (OSError, ValueError):
        return ""
    if told.get("which") != "best":
        return ""
    return f" (optimizer step {told['step']:,}, the best by {told['monitor']}: {told['score']:.4g})"
