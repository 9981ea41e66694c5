"""The parser of configurations, at every depth: whole key names, and short forms for sources, networks and rewards."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser

from lit_align.config.shorthand import Shorthand, expand_words, shorthands


class FullNamesParser(LightningArgumentParser):
    """Takes no abbreviated keys, which would be misspelt ones that work; writes out short forms.

    jsonargparse parses the options of every class with a parser of this class.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "allow_abbrev": False})
        self._short: dict[str, Shorthand] = {}

    def add_class_arguments(self, theclass: Any, nested_key: str | None = None, *args: Any, **kwargs: Any) -> Any:
        """Add the class's parameters, and note which of them take short forms."""
        if nested_key is None:
            self._short = shorthands(theclass)
        return super().add_class_arguments(theclass, nested_key, *args, **kwargs)

    def parse_object(self, cfg_obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Parse options, short forms written out."""
        if self._short and isinstance(cfg_obj, (Namespace, Mapping)):
            cfg_obj = cfg_obj.clone() if isinstance(cfg_obj, Namespace) else dict(cfg_obj)
            for key, short in self._short.items():
                *outer, name = key.split(".")
                held = cfg_obj.get(outer[0]) if outer else cfg_obj
                if isinstance(held, (Namespace, dict)) and (value := held.get(name)) is not None:
                    held[name] = short.expand(value)
        return super().parse_object(cfg_obj, *args, **kwargs)

    def parse_args(self, args: Any = None, *further: Any, **kwargs: Any) -> Any:
        """Parse arguments, short forms written out."""
        if self._short and isinstance(args, list):
            args = expand_words(args, self._short)
        return super().parse_args(args, *further, **kwargs)
