"""What no configuration may have called: each leaves a file where it was told to."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback
from torch.optim import Optimizer


def touch(path: str) -> None:
    """A function."""
    Path(path).touch()


def promises(path: str) -> Optimizer:  # type: ignore[return]
    """A function that promises what the slot of an optimizer holds."""
    Path(path).touch()


def promises_callback(path: str) -> Callback:
    """A function that promises, and gives, a callback."""
    Path(path).touch()
    return Callback()


def promises_function(path: str) -> Callable[..., Any]:
    """A function that returns a function."""
    Path(path).touch()
    return print


class Other:
    """A class of another kind."""

    def __init__(self, path: str) -> None:
        Path(path).touch()


class OtherCallable(Other):
    """A class of another kind whose objects can be called."""

    def __call__(self, *args: Any) -> list[float]:
        return [0.0]

    @classmethod
    def build(cls, path: str) -> OtherCallable:
        """A class method."""
        return cls(path)


class Open:
    """A module of a user's own that gives no type to what it takes."""

    def __init__(self, inner, others: Any = None) -> None:  # type: ignore[no-untyped-def]
        self.inner, self.others = inner, others

    def __call__(self, rows: list[dict], completions: list[str]) -> list[float]:
        """Scores."""
        return [0.0 for _ in completions]


class Method:
    """A step of a pipeline whose `run` is right, and which takes anything."""

    def __init__(self, inner: Any = None) -> None:
        self.inner = inner

    def run(self, out: Path) -> dict[str, float]:
        """Nothing."""
        return {}
