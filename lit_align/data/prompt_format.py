"""In which language prompts are written, in a stage and in the one before: the chat template's, or plain text."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

_CHAT = ("template", "plain template", "as it is")


def languages_of(entries: Iterable[dict[str, Any]]) -> tuple[int, int]:
    """Prompts in a chat template, and prompts as plain text, of a manifest's training data."""
    total: Counter[str] = Counter()
    for entry in entries:
        if entry.get("part") == "train":
            total.update(entry.get("languages") or {})
    return sum(total[name] for name in _CHAT), total["text"]


def differs_from_before(data: Any, model: str) -> list[str]:
    """Say where this data is written otherwise than that of the run that made the model.

    Args:
        data: a data module that is set up.
        model: the folder of the model, `RUN/model`.
    """
    chat, text = languages_of(data.manifest())
    lines = []
    if chat and text:
        lines.append(f"{chat:,} prompts are written in the chat template, {text:,} as plain text: two languages")
    try:
        told = json.loads((Path(model).parent / "manifest.json").read_text())
        before_chat, before_text = languages_of(told.get("data") or [])
    except (OSError, ValueError, AttributeError, TypeError):
        return lines
    if before_chat and not before_text and text > chat:
        lines.append(
            f"{text:,} prompts are plain text, and {model} was trained on prompts in the chat template: leave out "
            "data.template: none, or give the chat template"
        )
    elif before_text and not before_chat and chat > text:
        lines.append(
            f"{chat:,} prompts are written in the chat template, and {model} was trained on plain text: set "
            "data.template: none for prompts of text"
        )
    return lines
