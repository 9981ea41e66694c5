"""Short forms of rewards: the folder of a reward model, or a Python function."""

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
    """Expand a reward that is given as text to class and options; None if the text names a class.

    A folder that exists, or text with a slash, is a reward model's folder or hub name. `module.function` is a Python
    function.
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
    """Make a reward from a reward, a reward model's folder, or a function of (rows, completions).

    Raises:
        TypeError: the argument is none of these.
    """
    if isinstance(given, Reward):
        return given
    if isinstance(given, (str, os.PathLike, Network)):
        return ModelReward(given)  # type: ignore[arg-type]
    if callable(given) and not inspect.isclass(given):
        return FunctionReward(given)
    raise TypeError(f"expected a Reward, a reward model's folder or a function, got {given!r:.80}")
