"""What is wrong with a configuration, in one line: the key, and what it accepts.

jsonargparse reports a wrong value as a tree of everything it tried. The tree holds the answer, and this reads it.
"""

from __future__ import annotations

import difflib
import importlib
import re
from collections.abc import Iterable
from typing import Any, get_args, get_type_hints

from jsonargparse import ArgumentParser
from lightning import LightningDataModule, LightningModule


class ConfigError(ValueError):
    """A configuration that cannot be used, explained in one line."""


_NOISE = re.compile(
    r"Does not validate against any of|Subtypes:|Errors:|Given value|Expected a <class 'NoneType'>|Expected a path but"
)
_KEY = re.compile(r'Parser key "([^"]+)":?')
_CLASS = re.compile(r"Problem with given class_path '([^']+)'")
_OPTION = re.compile(
    r"Option '([^']+)' is not accepted|[Uu]nrecognized arguments: --(\S+)|Key '([^']+)' is not expected"
    r"|does not accept option '([^']+)'"
)
_IMPORT = re.compile(r"Expected a dot import path string: (\S+)|has no attribute '(\w+)'|No module named '([\w.]+)'")
_REQUIRED = re.compile(r"arguments are required: (.+)|Key \"([^\"]+)\" is required")
_LITERAL = re.compile(r"typing\.Literal\[([^\]]*)\]")
_TYPE = re.compile(r"<class '(?:[\w.]*\.)?(\w+)'>")


def explain(message: str) -> str:
    """One line for a message of jsonargparse's; the message itself, flattened, where it is not understood."""
    keys: list[str] = []
    classes: list[str] = []
    for line in message.splitlines():
        line = line.strip().removeprefix("- ").strip()
        if not line:
            continue
        if key := _KEY.match(line):
            keys.append(key[1])
            line = line[key.end() :].strip()
        if given := _CLASS.search(line):
            classes.append(given[1])
            continue
        if not line or _NOISE.match(line):
            continue
        return _sentence(".".join(keys), classes[-1] if classes else None, line)
    return " ".join(message.split())


def _sentence(key: str, class_path: str | None, problem: str) -> str:
    if option := _OPTION.search(problem):
        return _unknown_key(key, next(group for group in option.groups() if group).split("=")[0], class_path, problem)
    if wanted := _IMPORT.search(problem):
        name = next(group for group in wanted.groups() if group)
        names = _classes(key)
        known = _listed("; known here are", names) + ", or" if names else ";"
        return f"{key}: no class or function {name!r}{_suggest(name, names)}{known} give a full import path"
    if required := _REQUIRED.search(problem):
        missing = next(group for group in required.groups() if group)
        return f"{key + ': ' if key else ''}missing {missing}"
    problem = _LITERAL.sub(lambda m: "one of " + m[1].replace("'", ""), problem)
    problem = (
        _TYPE.sub(r"\1", problem).replace("Expected a one of", "expected one of").replace("Expected a ", "expected ")
    )
    problem = problem.replace(". Got value: ", ", got ")
    return f"{key}: {problem}" if key else problem


def _unknown_key(key: str, name: str, class_path: str | None, problem: str) -> str:
    full = f"{key}.{name}" if key else name
    if "callable class" in problem and (factory := re.search(r"class_path='([^']+)'", problem)):
        class_path = factory[1]
    if class_path is None and name.startswith("trainer."):
        class_path, name = "lightning.Trainer", name.removeprefix("trainer.")
    *path, last = name.split(".")
    cls = _nested(class_path, path)
    accepted = _options(cls)
    owner = f"; keys of {cls.__name__} are" if cls else ""
    return f"unknown key {full!r}{_suggest(last, accepted)}{_listed(owner, accepted)}"


def _suggest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name.split(".")[-1], list(known), n=1)
    return f", did you mean {close[0]!r}?" if close else ""


def _listed(lead: str, names: list[str]) -> str:
    return f"{lead} {', '.join(names)}" if names else ""


def _nested(class_path: str | None, path: list[str]) -> Any:
    """The class, or the class of a parameter of it where the key goes deeper."""
    module, _, name = (class_path or "").rpartition(".")
    try:
        cls = getattr(importlib.import_module(module), name)
        for part in path:
            hint = get_type_hints(cls.__init__)[part]
            cls = next(t for t in (hint, *get_args(hint)) if isinstance(t, type) and t is not type(None))
    except Exception:  # an explanation must not fail where the thing explained did
        return None
    return cls


def _options(cls: Any) -> list[str]:
    """Keys that a class accepts."""
    try:
        parser = ArgumentParser(exit_on_error=False)
        added = parser.add_class_arguments(cls, "x", fail_untyped=False)
    except Exception:  # as above
        return []
    return list(dict.fromkeys(key.split(".")[1] for key in added if "." in key and key != "x.params"))


def _classes(key: str) -> list[str]:
    """Names of our own classes that a top-level key accepts."""
    base = {"model": LightningModule, "data": LightningDataModule}.get(key)

    names, unseen = set(), [base] if base else []
    while unseen:
        cls = unseen.pop()
        unseen += cls.__subclasses__()
        if cls.__module__.startswith("lit_align."):
            names.add(cls.__name__)
    return sorted(names - {"AlignModule", "PolicyModule", "TextDataModule"})
