"""A user's own modules: those beside a configuration file can be named in it."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

# Folder of each module that was imported from a folder put on the path here, by the module's name.
_imported: dict[str, str] = {}


@contextlib.contextmanager
def importable(files: Iterable[Path]) -> Iterator[None]:
    """Put the folders of configuration files, and the working folder, at the end of the import path.

    At the end, so that no file of theirs takes the place of an installed module. Worker processes and further Python
    processes have them too.
    """
    wanted = dict.fromkeys(str(folder.resolve()) for folder in [*(file.parent for file in files), Path()])
    known = {os.path.abspath(path) for path in sys.path}
    added = [folder for folder in wanted if folder not in known]
    _forget({*wanted, *known})
    before, variable = set(sys.modules), os.environ.get("PYTHONPATH")
    sys.path.extend(added)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [variable, *added]))
    try:
        yield
    finally:
        sys.path[:] = [folder for folder in sys.path if folder not in added]
        if variable is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = variable
        for name in set(sys.modules) - before:
            place = _folder(name)
            if place in added:
                _imported[name] = place


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
