"""`--KEY.help`: what a key of a configuration takes, at any depth."""

from __future__ import annotations

import importlib
import inspect
import re
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from lightning import LightningDataModule, LightningModule, Trainer

import lit_align
from lit_align.callbacks import RunCheckpoint
from lit_align.config.errors import ConfigError
from lit_align.config.keys import Key, classes, keys
from lit_align.config.named_files import config_files

# Keys at the top that hold a class's options, and the class or its base.
_ROOTS: dict[str, type] = {
    "model": LightningModule,
    "data": LightningDataModule,
    "trainer": Trainer,
    "checkpoint": RunCheckpoint,
}


def asked(words: Sequence[str]) -> tuple[str, str | None] | None:
    """The key that `--KEY.help` asks about, and the class that follows it if there is one; None without such a word."""
    for number, word in enumerate(words):
        if found := re.fullmatch(r"--([\w.]+)\.help(?:=(.*))?", word):
            following = words[number + 1] if number + 1 < len(words) else "-"
            return found[1], found[2] or (None if following.startswith("-") else following)
    return None


def key_help(words: Sequence[str]) -> str:
    """Text for `--KEY.help [CLASS]`.

    Args:
        words: a command line with such a word. Its files and `--model=CLASS` decide which class has the key.

    Raises:
        ConfigError: no class has such a key.
    """
    key, named = asked(words) or ("", None)
    key = ".".join(part for part in key.split(".") if part != "init_args")
    root, *path = key.split(".")
    if root not in _ROOTS:
        raise ConfigError(f"--{key}.help: unknown key {root!r}; keys are {', '.join(_ROOTS)}")
    given = _given(words)
    if not path:
        return "\n".join(_lines(key, _ROOTS[root], None, named or given.get((root,))))
    for cls in _candidates(_ROOTS[root], given.get((root,))):
        if (found := _follow(cls, path, root, given)) is not None:
            return "\n".join(_lines(key, *found, named or given.get((root, *path))))
    raise ConfigError(
        f"--{key}.help: no class of {root} has the key {'.'.join(path)!r}; --{root}.help lists what it takes"
    )


def _given(words: Sequence[str]) -> dict[tuple[str, ...], str]:
    """Class of each key that the command line and its files name one for."""
    found: dict[tuple[str, ...], str] = {}

    def visit(value: Any, path: tuple[str, ...]) -> None:
        if not isinstance(value, dict):
            return
        if isinstance(value.get("class_path"), str):
            found[path] = value["class_path"]
        for name, item in value.items():
            visit(item, path if name == "init_args" else (*path, *str(name).split(".")))

    for file in config_files(list(words)):
        if file.is_file():
            visit(yaml.safe_load(Path(file).read_text()), ())
    for word in words:
        if class_of := re.fullmatch(r"--([\w.]+?)(?:\.class_path)?=([A-Za-z_][\w.]*)", word):
            found[tuple(part for part in class_of[1].split(".") if part != "init_args")] = class_of[2]
    return found


def _candidates(base: type, name: str | None) -> list[type]:
    """The class of that name, or else every class that may be meant."""
    if name is not None and (cls := _class_named(base, name)) is not None:
        return [cls]
    known = _subclasses(base)
    return known if known and base in (LightningModule, LightningDataModule) else [base]


def _class_named(base: type, name: str) -> type | None:
    if "." in name:
        module, _, last = name.rpartition(".")
        try:
            found = getattr(importlib.import_module(module), last, None)
        except ImportError:
            return None
        return found if isinstance(found, type) else None
    everywhere = [base, *_subclasses(base, ours=False)]
    return next((cls for cls in everywhere if cls.__name__ == name), None)


def _subclasses(base: type, ours: bool = True) -> list[type]:
    """Known subclasses; with `ours`, those that lit_align hands out."""
    found: dict[type, None] = {}
    unseen: list[type] = [base]
    while unseen:
        cls = unseen.pop(0)
        subclasses: list[type] = type.__subclasses__(cls)
        below = [sub for sub in subclasses if not sub.__name__.startswith("_")]
        unseen += below
        found |= dict.fromkeys(below)
    if not ours:
        return list(found)
    public = {name for name in lit_align.__all__ if name != "__version__"}
    modules = base in (LightningModule, LightningDataModule)
    mine = [cls for cls in found if cls.__module__.startswith("lit_align.")]
    chosen = [cls for cls in mine if cls.__name__ in public] if modules else mine
    return sorted(chosen, key=lambda cls: cls.__name__)


def _follow(cls: type, path: list[str], root: str, given: dict[tuple[str, ...], str]) -> tuple[type, Key | None] | None:
    """The class that a path leads to, and the last parameter on the way; None where a name is unknown."""
    parameter = None
    for number, name in enumerate(path):
        parameter = keys(cls).get(name)
        if parameter is None:
            return None
        inner = next((c for c in classes(parameter.hint) if c.__module__ != "builtins"), None)
        if inner is None:
            return (cls, parameter) if number == len(path) - 1 else None
        named = given.get((root, *path[: number + 1]))
        on_the_way = number < len(path) - 1 and named is not None
        cls = (_class_named(inner, named or "") if on_the_way else None) or inner
    return cls, parameter


def _lines(key: str, cls: type, parameter: Key | None, named: str | None) -> Iterator[str]:
    """What a key takes: a type, the keys of a class, or the classes to choose from."""
    if parameter is not None:
        yield f"{key}: {_type(parameter.hint)}{_default(parameter)}"
        yield from _wrapped(parameter.text, 2)
        if cls not in classes(parameter.hint):
            return
    known = [] if cls in (Trainer, RunCheckpoint) else _subclasses(cls) or _subclasses(cls, ours=False)
    chosen = None if named is None else _class_named(cls, named)
    if named is not None and chosen is None:
        raise ConfigError(f"--{key}.help: no class {named!r}; known are {', '.join(sub.__name__ for sub in known)}")
    if chosen is None and known:
        yield f"classes for {key}; --{key}.help CLASS lists the keys of one:"
        for sub in known:
            yield from _wrapped(f"{sub.__name__}: {_first_line(sub)}", 2)
        return
    cls = chosen or cls
    yield f"keys of {cls.__name__}: {_first_line(cls)}"
    for name, one in keys(cls).items():
        if name != "params":  # of an optimizer, which the module fills in
            yield f"  {key}.{name}: {_type(one.hint)}{_default(one)}"
            yield from _wrapped(one.text, 6)


def _type(hint: Any) -> str:
    text = getattr(hint, "__name__", str(hint)) if isinstance(hint, type) and not get_args(hint) else str(hint)
    return re.sub(r"\b(?:[a-z_]\w*\.)+(?=[A-Za-z])", "", text).replace("NoneType", "null").replace("None", "null")


def _default(key: Key) -> str:
    if key.default is inspect.Parameter.empty:
        return " (must be given)"
    simple = key.default is None or isinstance(key.default, (str, int, float, bool))
    return f" = {'null' if key.default is None else key.default}" if simple else ""


def _first_line(cls: type) -> str:
    return inspect.cleandoc(cls.__doc__ or "").partition("\n")[0]


def _wrapped(text: str, indent: int) -> list[str]:
    space = " " * indent
    return textwrap.wrap(text, 118, initial_indent=space, subsequent_indent=space + "  ")
