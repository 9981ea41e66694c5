"""The command line with the parser of one command and not of all four: a quarter of the time to build it."""

from __future__ import annotations

import pytest

from lit_align.cli import AlignCLI


def only(command: str, patch: pytest.MonkeyPatch) -> None:
    """Leave the command line with one of LightningCLI's commands."""
    kept = {command: AlignCLI.subcommands()[command]}
    patch.setattr(AlignCLI, "subcommands", staticmethod(lambda: kept))
