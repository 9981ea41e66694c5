"""Find a model folder from the folder of the run, the pipeline or the sweep that made it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def find_model(name: str, last: bool = False) -> str:
    """Resolve a name to a model folder. A model folder, and a name that is not a folder, is returned unchanged.

    Args:
        name: folder of a model, a run, a pipeline or a sweep, or a name on the hub.
        last: if a pipeline has several language models, take the last one instead of raising.

    Raises:
        ValueError: the name is a checkpoint, a run without a model, or a folder with several models (they are listed).
    """
    folder = Path(name)
    if name.endswith(".ckpt") and os.path.isfile(name):
        raise ValueError(
            f"{name!r} is a checkpoint, not a model's folder: name the folder of its run, {str(folder.parents[1])!r}"
        )
    # os.path returns False for a text that is too long for a file name; pathlib raises.
    if not os.path.isdir(name) or holds_model(folder):
        return name
    if holds_model(folder / "model"):
        return str(folder / "model")
    models = stage_models(folder)
    if last:
        models = [model for model in models if _is_language_model(model)] or models
    if len(models) == 1 or (models and last):
        return str(models[-1])
    if models:
        listed = ", ".join(str(model) for model in models)
        raise ValueError(f"{name!r} holds {len(models)} models: name one of {listed}")
    if (folder / "config.yaml").exists() and not (folder / "config.json").exists():
        raise ValueError(
            f"{name!r} is the folder of a run that has not ended, so it has no model yet. Resume it with "
            f"`lit-align fit -c {folder / 'config.yaml'} --ckpt_path last`, then its model is in {folder / 'model'}"
        )
    return name


def stage_models(folder: Path) -> list[Path]:
    """Models of a pipeline in the order of its stages, or of a sweep with the best point last."""
    inside = [path for path in folder.iterdir() if holds_model(path / "model")]
    order = list(_json(folder / "manifest.json").get("stages") or {})
    points = _json(folder / "sweep.json").get("points") or []
    order = order or [point["folder"] for point in reversed(points)]

    def place(path: Path) -> tuple[int, float]:
        known = order.index(path.name) if path.name in order else len(order)
        return known, (path / "model").stat().st_mtime

    return [path / "model" for path in sorted(inside, key=place)]


def holds_model(folder: str | Path) -> bool:
    """True if the folder holds a model or an adapter."""
    return any(os.path.exists(os.path.join(folder, file)) for file in ("config.json", "adapter_config.json"))


def is_adapter(name: str | Path) -> bool:
    """True if the folder holds an adapter without its base model."""
    return os.path.exists(os.path.join(name, "adapter_config.json")) and not os.path.exists(
        os.path.join(name, "config.json")
    )


def adapter_base(name: str | Path) -> str:
    """Name or folder of an adapter's base model; empty if the adapter does not record it."""
    return str(_json(Path(name, "adapter_config.json")).get("base_model_name_or_path") or "")


def _is_language_model(folder: Path) -> bool:
    """True unless the folder holds a reward model."""
    classes = _json(folder / "config.json").get("architectures") or []
    return not any("SequenceClassification" in name for name in classes) and (
        _json(folder / "adapter_config.json").get("task_type") != "SEQ_CLS"
    )


def _json(file: Path) -> dict[str, Any]:
    """Content of a JSON file; empty if it is missing or damaged. Loading the model reports damage."""
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
