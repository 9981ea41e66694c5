"""What is wrong with a configuration, in one line: the key, and what it accepts.

jsonargparse reports a wrong value as a tree of everything it tried. The tree holds the answer, and this reads it.
"""

from __future__ import annotations

import difflib
import importlib
import itertools
import re
from collections.abc import Iterable
from typing import Any

import lit_align
from lit_align.config.keys import inner_class
from lit_align.config.other_names import moved_class, now_called


class ConfigError(ValueError):
    """A configuration that cannot be used, explained in one line."""


_NOISE = re.compile(
    r"Does not validate against any of|Subtypes:|Errors:|Given value|Expected a <class 'NoneType'>|Expected a path but"
)
_KEY = re.compile(r'(?:Type \S.* expects a function or a callable class: )?Parser key "([^"]+)":?')
_CLASS = re.compile(r"Problem with given class_path '([^']+)'")
_OPTION = re.compile(
    r"Option '(?P<option>[^']+)' is not accepted|[Uu]nrecognized arguments: --(?P<argument>[^\s=]+)"
    r"|Key '(?P<key>[^']+)' is not expected|(?:Group '(?P<group>[^']+)' )?does not accept option '(?P<inner>[^']+)'"
)
_IMPORT = re.compile(r"Expected a dot import path string: (\S+)|has no attribute '(\w+)'|No module named '([\w.]+)'")
_DENIED = re.compile(r"Importing '([^']+)' is not allowed")
_REQUIRED = re.compile(r"arguments are required: (.+)|Key \"([^\"]+)\" is required")
_INSTANCE = re.compile(r"(?:Not a valid subclass of|Does not implement protocol) (\w+)(?:\. Got value: (.*))?")
_ALTERNATIVE = re.compile(r"Expected a (<class '[^']+'>|typing\.Literal\[[^\]]*\])")
# `dict_kwargs` pass through the parser unchecked; the class itself refuses them.
_KEYWORD = re.compile(r"(\w+)(?:\.__init__)?\(\) got an unexpected keyword argument '(\w+)'")
_COMMAND = re.compile(r"\b(?:fit|validate|test|predict)\.")
_LITERAL = re.compile(r"typing\.Literal\[([^\]]*)\]")
_TYPE = re.compile(r"<class '(?:[\w.]*\.)?(\w+)'>")

# The keys at the top of a configuration, and whose keys lie under those that name no class.
_TOP = ["seed_everything", "trainer", "model", "data", "out", "checkpoint", "ckpt_path", "export", "resume"]
_OWNERS = {"trainer": "lightning.Trainer", "checkpoint": "lightning.pytorch.callbacks.ModelCheckpoint"}


def explain(message: str) -> str:
    """One line for a message of jsonargparse's; the message itself, flattened, where it is not understood."""
    keys: list[str] = []
    classes: list[str] = []
    lines = [line.strip().removeprefix("- ").strip() for line in message.splitlines()]
    for number, line in enumerate(lines):
        if key := _KEY.match(line):
            keys.append(key[1])
            line = line[key.end() :].strip()
        if given := _CLASS.search(line):
            classes.append(given[1])
            continue
        if not line or _NOISE.match(line):
            continue
        if number == 0 and not keys:
            line = " ".join(message.split())  # no tree
        if _ALTERNATIVE.fullmatch(line):
            line = _alternatives(lines[number:])
        return _sentence(".".join(keys), classes[-1] if classes else None, line)
    return " ".join(message.split())


def _alternatives(lines: list[str]) -> str:
    """All that a union accepts as one expectation, where the tree has a line for each; and what was given."""
    wanted = itertools.takewhile(lambda line: line.startswith("Expected a "), lines)
    accepted = [match[1] for match in map(_ALTERNATIVE.fullmatch, wanted) if match]
    literals = [match[1].replace("'", "") for match in map(_LITERAL.fullmatch, accepted) if match]
    choices = ", ".join(dict.fromkeys(", ".join(literals).split(", ")))
    types = [name for name in accepted if not _LITERAL.fullmatch(name)]
    given = next((line for line in lines if line.startswith("Given value: ")), "Given value: ?")
    given = given.removeprefix("Given value: ").partition(". Got value: ")[0]
    return f"Expected a {' or '.join([f'typing.Literal[{choices}]'] * bool(choices) + types)}. Got value: {given}"


def _sentence(key: str, class_path: str | None, problem: str) -> str:
    if option := _OPTION.search(problem):
        return _unknown_key(key, ".".join(part for part in option.groups() if part), class_path, problem)
    if unknown := _KEYWORD.search(problem):
        return f"{key + '.' if key else ''}dict_kwargs.{unknown[2]}: {unknown[1]} has no such option; remove it"
    if denied := _DENIED.search(problem):
        key = key or "class_path"
        return f"{key}: a configuration may not name {denied[1]!r}: it runs commands or opens files (docs/security.md)"
    if wanted := _IMPORT.search(problem):
        name = next(group for group in wanted.groups() if group)
        if (now := moved_class(name, class_path)) is not None:
            return f"{key}: {now}"
        names = _classes(key)
        known = _listed("; known here are", names) + ", or" if names else ";"
        return f"{key}: no class or function {name!r}{_suggest(name, names)}{known} give a full import path"
    if required := _REQUIRED.search(problem):
        missing = next(group for group in required.groups() if group)
        return f"{key + ': ' if key else ''}missing {re.sub(_COMMAND, '', missing)}"
    if instance := _INSTANCE.match(problem):
        got = f", got {instance[2]}" if instance[2] else ""
        known = _listed("; known here are", _classes(key))
        return f"{key}: expected a {instance[1]}, by class_path and init_args or by its own keys{got}{known}"
    problem = _LITERAL.sub(lambda m: "one of " + m[1].replace("'", ""), problem)
    problem = (
        _TYPE.sub(r"\1", problem).replace("Expected a one of", "expected one of").replace("Expected a ", "expected ")
    ).replace("NoneType", "null")
    problem = problem.replace(". Got value: ", ", got ")
    return f"{key}: {problem}" if key else problem


def _unknown_key(key: str, name: str, class_path: str | None, problem: str) -> str:
    full = f"{key}.{name}" if key else name
    if (now := now_called(full)) is not None:
        return f"unknown key {full!r}: {now}"
    if "callable class" in problem and (factory := re.search(r"class_path='([^']+)'", problem)):
        class_path = factory[1]
    top, _, rest = name.partition(".")
    if class_path is None and not key:
        if top not in _OWNERS:
            return f"unknown key {full!r}{_suggest(top, _TOP)}{_listed('; keys are', _TOP)}"
        class_path, name = _OWNERS[top], rest
    *path, last = name.split(".")
    # The first name that is unknown: nothing is known of those below it.
    while path and _nested(class_path, path) is None:
        *path, last = path
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
        return inner_class(getattr(importlib.import_module(module), name), path)
    except Exception:  # an explanation must not fail where the thing explained did
        return None


def _options(cls: Any) -> list[str]:
    """Keys that a class accepts."""
    from jsonargparse import ArgumentParser

    try:
        parser = ArgumentParser(exit_on_error=False)
        added = parser.add_class_arguments(cls, "x", fail_untyped=False)
    except Exception:  # as above
        return []
    return list(dict.fromkeys(key.split(".")[1] for key in added if "." in key and key != "x.params"))


def _classes(key: str) -> list[str]:
    """Names of our own classes that a top-level key accepts."""
    from lightning import LightningDataModule, LightningModule  # takes seconds, which an error can do without

    base = {"model": LightningModule, "data": LightningDataModule}.get(key)

    names, unseen = set(), [base] if base else []
    while unseen:
        cls = unseen.pop()
        unseen += cls.__subclasses__()
        if cls.__module__.startswith("lit_align."):
            names.add(cls.__name__)
    return sorted(names & set(lit_align.__all__))  # not their base classes
