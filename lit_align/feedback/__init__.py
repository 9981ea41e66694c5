"""Where preferences and better answers come from: people, rewards, judges, and whether their labels can be trusted."""

from __future__ import annotations

import importlib
from typing import Any

# Imported on first use: some need torch, and the annotation server starts without it.
_ELSEWHERE = {
    "BestOfN": "sampled",
    "BestWorstPairs": "sampled",
    "Label": "labels",
    "read_labels": "labels",
    "write_labels": "labels",
    "Task": "tasks",
    "build_tasks": "tasks",
}

__all__ = ["BestOfN", "BestWorstPairs", "Label", "Task", "build_tasks", "read_labels", "write_labels"]


def __getattr__(name: str) -> Any:
    if name not in _ELSEWHERE:
        raise AttributeError(f"module 'lit_align.feedback' has no attribute {name!r}")
    return getattr(importlib.import_module(f"lit_align.feedback.{_ELSEWHERE[name]}"), name)
