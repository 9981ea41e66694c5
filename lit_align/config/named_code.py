"""Which code a configuration may name: classes that fit their slots, and functions where a slot takes a function.

A class path is built with arguments that the same file gives, so a function under `class_path` would be called with
them: `{class_path: os.system, init_args: {command: ...}}`. jsonargparse checks that a class is of the kind that its
slot asks for; it lets functions pass, and builds any class where a parameter has no type. Both are refused here, before
anything is called.

A slot for a function takes the user's own. Among those of Python and of installed libraries are many that evaluate text
(`sympy.sympify`, `pandas.eval`), read pickles or start programs, more than a list of names can hold. See
docs/security.md.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, get_type_hints

import yaml
from jsonargparse import Namespace, get_loader, set_loader, set_parsing_settings

from lit_align.config.errors import ConfigError
from lit_align.utils import limits, versions

# Modules of libraries that hold arithmetic alone.
_ARITHMETIC = ("math", "torch.nn.functional", "torch.nn.init")


def restrict() -> None:
    """Refuse modules that run commands or touch files (os, subprocess, ...), and build nothing without a type."""
    # An empty list adds no entry: it turns jsonargparse's own list from a warning into an error, as 5.0 will.
    set_parsing_settings(import_path_denylist=[], instantiate_subclass_spec_in_any=False)
    if get_loader("yaml") is not _load:
        _LOADERS.append(get_loader("yaml"))
        # Its errors mean "no YAML", and the text is then taken as it stands.
        set_loader("yaml", _load, exceptions=(yaml.YAMLError,))


_LOADERS: list[Callable[[str], Any]] = []  # jsonargparse's own


def _load(text: str) -> Any:
    """Jsonargparse's YAML of files and values, within the limits of `limits.py`."""
    if len(text) > 200 or "*" in text:  # what is shorter can do no harm
        limits.check_yaml(text, "a value")
    return _LOADERS[0](text)


def check(config: Any, key: str = "") -> None:
    """Look at every class path of a parsed configuration.

    Args:
        config: as the parser returns it: namespaces, mappings and lists, nested.
        key: where it stands, for messages.

    Raises:
        ConfigError: a class path that names no class, a class for a parameter without a type, or a function of a
            library; names the key.
    """
    if inspect.isroutine(config):
        _check_function(config, key)
    for inner, value in _items(config):
        check(value, f"{key}.{inner}" if key else str(inner))
    if not _is_spec(config):
        return
    named = config["class_path"]
    cls = _object(named)
    if not inspect.isclass(cls):
        raise ConfigError(
            f"{key}: class_path names {named!r}, which is no class: it would be called with the arguments of the "
            "configuration. Name a class; a function is named by its import path alone, where the slot takes one"
        )
    for name, value in _items(config.get("init_args")):
        if _open(cls, str(name)) and any(map(_is_spec, _parts(value))):
            raise ConfigError(
                f"{key}.{name}: {cls.__name__} gives {name!r} no type, so that any class could be built for it: "
                f"annotate the parameter with the class that it takes"
            )


def _check_function(function: Any, key: str) -> None:
    module, name = getattr(function, "__module__", None) or "", getattr(function, "__name__", repr(function))
    root = module.partition(".")[0]
    own = root == "lit_align" or (root and root not in sys.stdlib_module_names and not versions.is_dependency(root))
    if not own and not any(getattr(sys.modules.get(place), name, None) is function for place in _ARITHMETIC):
        raise ConfigError(
            f"{key}: a configuration may not name {module}.{name}, a function of Python's or of a library: some of "
            "them run text of the data as code. Name a function of your own, which may call it (docs/security.md)"
        )


def _is_spec(value: Any) -> bool:
    return isinstance(value, (Namespace, Mapping)) and isinstance(value.get("class_path"), str)


def _items(value: Any) -> Iterator[tuple[Any, Any]]:
    """Keys and values of a namespace or mapping, indices and items of a list."""
    if isinstance(value, Namespace):
        yield from vars(value).items()
    elif isinstance(value, Mapping):
        yield from value.items()
    elif isinstance(value, (list, tuple)):
        yield from enumerate(value)


def _parts(value: Any) -> Iterator[Any]:
    yield value
    for _, item in _items(value):
        yield from _parts(item)


def _object(path: str) -> Any:
    """The object of an import path; None if there is none."""
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except ModuleNotFoundError:
        parent = _object(module) if "." in module else None
        return getattr(parent, name, None)
    except (ImportError, AttributeError, ValueError):
        return None


def _open(cls: type, parameter: str) -> bool:
    """True if a parameter of a class accepts any object."""
    try:
        signature = inspect.signature(cls.__init__).parameters  # type: ignore[misc]
        hints = get_type_hints(cls.__init__)  # type: ignore[misc]
    except (NameError, TypeError, ValueError, AttributeError):
        return False
    return parameter in signature and hints.get(parameter, Any) in (Any, object)
