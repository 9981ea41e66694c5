"""The commands: `entry` finds one and imports only what it needs; the other files hold one command or part each."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from lit_align.cli.entry import main

if TYPE_CHECKING:
    from lit_align.cli.lightning_cli import AlignCLI, DoctorCLI

__all__ = ["AlignCLI", "DoctorCLI", "main"]


def __getattr__(name: str) -> Any:
    if name in __all__:  # imported on first use: they need torch and Lightning
        return getattr(importlib.import_module("lit_align.cli.lightning_cli"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
