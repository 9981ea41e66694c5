"""The walls of the house: imports point down, a file is one idea, and the functional room is pure."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "lit_align"

# What each room may import: utils <- types <- functional <- data, models <- rollout, rewards <- modules <- the rest.
LEARNING = {"utils", "types", "functional", "accelerate", "data", "models", "rollout", "rewards", "modules"}
BELOW = {
    "utils": set(),
    "types": set(),
    "functional": {"types"},
    "accelerate": {"types", "functional"},
    "data": {"utils", "types", "functional"},
    "models": {"utils", "types", "functional", "accelerate"},
    "rollout": {"utils", "types", "functional", "data", "models"},
    "rewards": {"utils", "types", "functional", "data", "models"},
    "modules": {"utils", "types", "functional", "models", "rollout", "rewards"},
    "callbacks": LEARNING,
    "doctor": LEARNING,
    "evaluation": LEARNING | {"report"},
    "feedback": LEARNING | {"evaluation", "report"},
    # Plugs in through the doors that a user's own world would use; nothing below the command line knows of it.
    "sandbox": LEARNING | {"evaluation"},
    "report": {"utils"},
    # Explains keys by the signatures of the classes that it configures.
    "config": {"utils", "data", "models", "rewards", "callbacks"},
    "pipeline": {"utils", "data", "models", "callbacks", "config"},
    "cli": LEARNING | {"callbacks", "doctor", "evaluation", "feedback", "report", "config", "pipeline"},
    "__main__": {"utils", "config", "cli"},
    "__init__": LEARNING,
}
# Files of one name in two rooms: the methods, whose name repeats in every layer, and their base.
METHODS = {"sft", "reward", "dpo", "kto", "ppo", "grpo"}


def room(path: Path) -> str:
    relative = path.relative_to(PACKAGE)
    return relative.parts[0].removesuffix(".py")


def imported_names(path: Path) -> Iterator[str]:
    """Dotted names of lit_align that a file imports, inside functions too; for type checking alone does not count."""
    tree = ast.parse(path.read_text())
    guarded = {
        id(node)
        for test in ast.walk(tree)
        if isinstance(test, ast.If) and getattr(test.test, "id", "") == "TYPE_CHECKING"
        for node in ast.walk(test)
    }
    for node in ast.walk(tree):
        if id(node) in guarded:
            continue
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lit_align"):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("lit_align."))


def imports(path: Path) -> set[str]:
    return {name.split(".")[1] for name in imported_names(path)} - {"__version__"}


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    here = room(path)
    assert here in BELOW, f"{here} is a new room: say what it may import"
    assert imports(path) - {here} <= BELOW[here]


def test_nothing_strays_outside_the_rooms() -> None:
    assert {path.stem for path in PACKAGE.glob("*.py")} == {"__init__", "__main__", "types"}
    assert (PACKAGE / "py.typed").exists()


def test_a_name_is_the_name_of_one_file() -> None:
    names = Counter(path.stem for path in FILES if path.stem != "__init__")
    twice = {name for name, count in names.items() if count > 1}
    assert twice <= METHODS
    rooms = {path.parent.name for path in FILES if path.stem in METHODS}
    assert rooms <= {"functional", "modules"}


def test_no_file_imports_itself_through_others() -> None:
    """No circle, imports inside functions included."""
    files = {dotted(path): path for path in FILES}
    TopologicalSorter({name: set(imported_files(path, files)) - {name} for name, path in files.items()}).prepare()


def dotted(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


def imported_files(path: Path, files: dict[str, Path]) -> Iterator[str]:
    for name in imported_names(path):
        inside = name if name in files else name.rpartition(".")[0]
        if inside != "lit_align":
            yield inside


def test_test_folders_mirror_the_package() -> None:
    """A test of a room is in the folder of that room; at the top are tests of the repository as a whole."""
    tests = Path(__file__).parent
    rooms = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    folders = {path.name for path in tests.iterdir() if path.is_dir() and any(path.glob("test_*.py"))}
    assert folders <= rooms


@pytest.mark.parametrize("path", sorted((PACKAGE / "functional").glob("*.py")), ids=lambda path: path.name)
def test_functional_is_pure(path: Path) -> None:
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        assert not [name for name in names if name.split(".")[0] in ("lightning", "transformers", "datasets")]
        # No choice of a device either.
        assert not (isinstance(node, ast.Attribute) and node.attr in ("cuda", "cpu"))


def test_the_name_of_a_method_repeats_in_every_layer() -> None:
    for method in ("sft", "reward", "dpo", "ppo"):
        assert (PACKAGE / "functional" / f"{method}.py").exists()
        assert (PACKAGE / "modules" / f"{method}.py").exists()
        assert (PACKAGE.parent / "experiments" / "sandbox" / f"{method}.yaml").exists()
