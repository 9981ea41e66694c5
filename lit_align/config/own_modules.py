"""A user's own modules: those beside a configuration file can be named in it.

Their folders are not on `sys.path`. There, `import torch_xla`, which a library tries in case it is installed, would run
a file of that name which came along with a configuration.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import FrameType
from typing import Any

# For processes that this one starts anew: folders, and names that the configuration holds.
_VARIABLE = "LIT_ALIGN_OWN_MODULES"
# The first part of a dotted name.
_NAMED = re.compile(r"(?<![\w.$/\\-])([A-Za-z_]\w*)(?=\.[A-Za-z_])")
# Folder of each module that was imported from a folder given here, by the module's name.
_imported: dict[str, str] = {}


class _Finder:
    """Finds a module in the users' folders if a configuration names it, or if a module from there imports it."""

    def __init__(self, folders: Iterable[str], names: Iterable[str]) -> None:
        self.folders, self.names = list(folders), set(names)

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """The module's place; None for any other, and for parts of packages, whose own path finds them."""
        if path is not None or "." in name or not (name in self.names or self._wanted_by_its_own()):
            return None
        return PathFinder.find_spec(name, self.folders)

    def invalidate_caches(self) -> None:
        """Of `importlib.invalidate_caches`; there are none."""

    def _wanted_by_its_own(self) -> bool:
        frame: FrameType | None = sys._getframe(2)
        while frame is not None and frame.f_code.co_filename.startswith("<frozen importlib"):
            frame = frame.f_back
        file = frame.f_code.co_filename if frame is not None else ""
        # multiprocessing reads an object of a module of theirs before that module is there.
        unpickled = frame is not None and frame.f_globals.get("__name__", "").startswith("multiprocessing.")
        return unpickled or any(Path(file).is_relative_to(folder) for folder in self.folders)


@contextlib.contextmanager
def importable(files: Iterable[Path], words: Iterable[str] = ()) -> Iterator[None]:
    """Let a configuration name the modules beside it and those in the working folder.

    Installed modules come first: no file of a user's takes the place of one. A module that is neither named, as in
    `my_reward.Reward`, nor imported by one that is, is not found. Worker processes find the same.

    Args:
        files: the configuration's; those that do not exist are YAML themselves.
        words: of the command line.
    """
    files = list(files)
    wanted = dict.fromkeys(str(folder.resolve()) for folder in [*(file.parent for file in files), Path()])
    known = {os.path.abspath(path) for path in sys.path}
    added = [folder for folder in wanted if folder not in known]
    names = {name for text in [*map(_text, files), *words] for name in _NAMED.findall(text)}
    outer = next((finder for finder in reversed(sys.meta_path) if isinstance(finder, _Finder)), _Finder([], []))
    finder = _Finder(dict.fromkeys([*outer.folders, *added]), outer.names | names)
    _forget({*finder.folders, *wanted, *known})
    before, variable = set(sys.modules), os.environ.get(_VARIABLE)
    sys.meta_path.append(finder)
    os.environ[_VARIABLE] = json.dumps({"folders": finder.folders, "names": sorted(finder.names)})
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        if variable is None:
            del os.environ[_VARIABLE]
        else:
            os.environ[_VARIABLE] = variable
        for name in set(sys.modules) - before:
            place = _folder(name)
            if place in added:
                _imported[name] = place


def inherit() -> None:
    """Find what the process found that started this one."""
    if told := os.environ.get(_VARIABLE):
        sys.meta_path.append(_Finder(**json.loads(told)))


def _text(file: Path) -> str:
    try:
        return file.read_text(errors="replace")
    except OSError:
        return str(file)


def _forget(folders: set[str]) -> None:
    """Drop modules from other folders: this configuration may have its own module of the same name."""
    for name, folder in list(_imported.items()):
        if folder not in folders:
            sys.modules.pop(name, None)
            del _imported[name]


def _folder(name: str) -> str | None:
    """The folder in which a module, or the package around it, lies."""
    file = getattr(sys.modules.get(name.partition(".")[0]), "__file__", None)
    if file is None:
        return None
    path = Path(file).resolve()
    return str(path.parents[1] if path.name == "__init__.py" else path.parent)
