"""A reward from less than its options: a reward model's folder, or a Python function."""

from __future__ import annotations

import importlib
import inspect
import os
import re
from typing import Any

from lit_align.models.network import Network
from lit_align.rewards.function import FunctionReward
from lit_align.rewards.model import ModelReward
from lit_align.rewards.protocol import Reward


def reward_spec(text: str) -> dict[str, Any] | None:
    """The class and options of a reward that is given as a text alone; None if the text names a class.

    A folder that exists, or a text with a slash, is a reward model's folder or name on the hub. `module.function` is a
    Python function.
    """
    if "/" in text or os.path.isdir(text):
        return {"class_path": "lit_align.ModelReward", "init_args": {"network": {"name": text}}}
    module, _, name = text.rpartition(".")
    if not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", module):
        return None
    try:
        found = getattr(importlib.import_module(module), name, None)
    except ImportError:  # the parser names what cannot be imported
        return None
    if not callable(found) or inspect.isclass(found):
        return None
    return {"class_path": "lit_align.FunctionReward", "init_args": {"function": text}}


def as_reward(given: Any) -> Reward:
    """A reward as it is, from a reward model's folder, or from a function of (rows, completions).

    Raises:
        TypeError: none of them.
    """
    if isinstance(given, Reward):
        return given
    if isinstance(given, (str, os.PathLike, Network)):
        return ModelReward(given)  # type: ignore[arg-type]
    if callable(given) and not inspect.isclass(given):
        return FunctionReward(given)
    raise TypeError(f"expected a Reward, a reward model's folder or a function, got {given!r:.80}")
