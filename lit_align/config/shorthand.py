"""Short forms in a configuration: `network: FOLDER`, `train: [rows.jsonl]`, `reward: FOLDER`, written out in full.

They are written out where a class's options are parsed, so that `--model.network.lora.r=8` adds to `network: FOLDER`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args, get_origin, get_type_hints

import yaml
from jsonargparse import Namespace

from lit_align.data.source import Source, keys_of
from lit_align.models.network import Lora, Network
from lit_align.rewards import Reward, reward_spec


@dataclass(frozen=True)
class Shorthand:
    """How a parameter of a class may be given.

    Attributes:
        full: the options that a text stands for; None if the text is no short form. Of a `lora`, a number or a bool.
        container: list or dict, if the parameter takes several; else None.
    """

    full: Callable[[Any], Any]
    container: type | None = None

    def expand(self, value: Any) -> Any:
        """The value with every short form in it written out."""
        if self.container is list:
            if isinstance(value, (str, Mapping, Namespace)) and not (isinstance(value, str) and _is_config(value)):
                value = [value]  # `train: rows.jsonl`, or one source's keys without the list
            return [self._one(item) for item in value] if isinstance(value, list) else value
        if self.container is dict and isinstance(value, Mapping):
            return {key: self._one(item) for key, item in value.items()}
        return self._one(value) if self.container is None else value

    def _one(self, value: Any) -> Any:
        if self.full is not _lora and (not isinstance(value, str) or _is_config(value)):
            return value
        full = self.full(value)
        return value if full is None else full


def _is_config(text: str) -> bool:
    """Whether jsonargparse reads the options from a file of this name, or is given them as a text."""
    return text.endswith((".yaml", ".yml")) or text.lstrip().startswith(("{", "["))


def _lora(value: Any) -> Any:
    """`lora: true` is the default rank, `lora: 8` a rank; None for anything else."""
    if isinstance(value, bool):
        return {"r": Lora().r} if value else value
    return {"r": value} if isinstance(value, int) else None


# What takes a short form, and how a text is written out.
_FULL: dict[type, Callable[[str], Any]] = {
    Source: keys_of,
    Network: lambda text: {"name": text},
    Reward: reward_spec,
}


def shorthands(cls: Any) -> dict[str, Shorthand]:
    """Parameters of a class that take short forms, those of its bases included."""
    found: dict[str, Shorthand] = {}
    for base in reversed(getattr(cls, "__mro__", ())):
        if "__init__" not in vars(base):
            continue
        try:
            hints = get_type_hints(base.__init__)
        except Exception:  # of a class of the user's, whose hints cannot be read here; jsonargparse reads more
            continue
        for name, hint in hints.items():
            if short := _shorthand(hint):
                found[name] = short
                if short.full is _FULL[Network] and short.container is None:
                    found[f"{name}.lora"] = Shorthand(_lora)
    return found


def _shorthand(hint: Any, container: type | None = None) -> Shorthand | None:
    if isinstance(hint, type) and hint in _FULL:
        return Shorthand(_FULL[hint], container)
    origin = get_origin(hint)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        container, inner = dict, get_args(hint)[1:]
    elif isinstance(origin, type) and issubclass(origin, Sequence):
        container, inner = list, get_args(hint)
    else:
        inner = get_args(hint)  # of a union
    return next((short for part in inner if (short := _shorthand(part, container))), None)


def expand_words(words: Sequence[str], short: Mapping[str, Shorthand]) -> list[str]:
    """Arguments of a class's own parser, `--KEY=VALUE`, with short forms written out."""
    expanded = []
    for word in words:
        key, equals, value = word.partition("=")
        known = short.get(key.removeprefix("--"))
        if equals and known is not None:
            given = _content(value)
            full = known.expand(given)
            word = word if full == given else f"{key}={json.dumps(full)}"
        expanded.append(word)
    return expanded


def _content(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text
