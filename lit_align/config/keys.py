"""The keys that a class takes in a configuration: names, types, defaults and what its docstring says of each."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, get_args, get_type_hints


@dataclass(frozen=True)
class Key:
    """A parameter of a class.

    Attributes:
        hint: its type.
        default: `inspect.Parameter.empty` if it must be given.
        text: what the docstring says of it.
    """

    hint: Any
    default: Any
    text: str


def keys(cls: type) -> dict[str, Key]:
    """Parameters of a class, and those of its bases that it hands on by `**options`."""
    found: dict[str, Key] = {}
    for base in cls.__mro__:
        if "__init__" not in vars(base):
            continue
        signature = inspect.signature(base.__init__).parameters.values()  # type: ignore[misc]
        texts, hints = described(base), _hints(base)
        for parameter in list(signature)[1:]:
            if parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
                text = texts.get(parameter.name, "")
                key = Key(hints.get(parameter.name, Any), parameter.default, text)
                found.setdefault(parameter.name, key)
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in signature):
            break
    return found


def described(cls: type) -> dict[str, str]:
    """What the Args or Attributes of a docstring say of each name."""
    texts: dict[str, str] = {}
    name = None
    inside, indent = False, 0
    for line in inspect.cleandoc(cls.__doc__ or "").splitlines():
        if re.fullmatch(r"\w[\w ]*:", line):
            inside, name = line in ("Args:", "Attributes:"), None
        elif (
            inside
            and (begun := re.match(r"( +)(\w+)(?: \([^)]*\))?: (.*)", line))
            and (name is None or len(begun[1]) <= indent)
        ):
            name, indent = begun[2], len(begun[1])
            texts[name] = begun[3]
        elif inside and name is not None and line.strip():
            texts[name] += " " + line.strip()
    return texts


def classes(hint: Any) -> Iterator[type]:
    """Classes in a type: of a union its parts, of a list or mapping what it holds."""
    if isinstance(hint, type) and hint is not type(None) and not get_args(hint):
        yield hint
    for part in get_args(hint):
        yield from classes(part)


def inner_class(cls: type, path: list[str]) -> type | None:
    """The class of a parameter of a parameter; None if a name on the way is unknown or takes no class."""
    for name in path:
        key = keys(cls).get(name)
        found = None if key is None else next((c for c in classes(key.hint) if c.__module__ != "builtins"), None)
        if found is None:
            return None
        cls = found
    return cls


def _hints(cls: type) -> dict[str, Any]:
    try:
        return get_type_hints(cls.__init__)  # type: ignore[misc]
    except Exception:  # names that only a type checker can see
        return {}
