"""Whether the weights of a checkpoint are those of a module."""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any


def check_state(here: Mapping[str, Any], there: Mapping[str, Any], frozen: Set[str]) -> None:
    """Compare names and shapes before anything is loaded.

    Args:
        here: state of the module.
        there: state in the checkpoint.
        frozen: names that checkpoints leave out.

    Raises:
        ValueError: the checkpoint lacks weights, has others, or has them in another shape.
    """
    missing, unknown = set(here) - set(there) - frozen, set(there) - set(here)
    if missing or unknown:
        what, names = ("lacks", missing) if missing else ("has unknown", unknown)
        raise ValueError(f"the checkpoint {what} {len(names)} weights, the first being {min(names)!r}: other model?")
    if other := [name for name in there if here[name].shape != there[name].shape]:
        was, now = tuple(there[other[0]].shape), tuple(here[other[0]].shape)
        raise ValueError(
            f"the checkpoint holds {other[0]!r} of shape {was}, and the run has {now}: the starting model has changed "
            "since; put it back"
        )
