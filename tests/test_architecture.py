"""The walls of the house: imports point down, a file is one idea, and the functional room is pure."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "lit_align"

# What each room may import; `types, disk, cache <- functional <- data | models <- rollout, rewards <- modules <- ...`.
BELOW = {
    "types": set(),
    "disk": set(),
    "cache": set(),
    "functional": {"types"},
    "model_folder": set(),
    "data": {"types", "disk", "cache", "functional", "model_folder"},
    "models": {"types", "disk", "functional", "model_folder", "versions"},
    "rollout": {"types", "functional", "data", "models"},
    "rewards": {"types", "functional", "data", "models"},
    "modules": {"types", "cache", "functional", "models", "rollout", "rewards"},
    "callbacks": {"types", "disk", "functional", "data", "models", "rollout", "rewards", "modules"},
    "evaluation": {"types", "disk", "functional", "data", "models", "rollout", "rewards", "modules"},
    "steps": {"types", "functional", "data", "models", "rollout", "rewards", "modules", "evaluation"},
    "chat": {"models", "model_folder"},
    "doctor": {"types", "functional", "data", "models", "rollout", "rewards", "modules"},
    "feedback": {"types", "disk", "functional", "data", "models", "rollout", "rewards", "modules", "evaluation"},
    "rounds": set(),
    "pipeline": {"disk", "callbacks", "rounds", "stage_files"},
    "report": {"disk"},
    # Plugs in through the doors a user's own world would use; nothing below cli knows of it.
    "sandbox": {"types", "disk", "functional", "data", "models", "rollout", "rewards", "modules", "evaluation"},
    "keys": set(),
    "other_names": set(),
    "config_error": {"keys", "other_names"},
    "config_files": {"config_error"},
    "config_lists": set(),
    "named_code": {"config_error"},
    "own_modules": set(),
    "shorthand": {"data", "models", "rewards"},
    "parser": {"shorthand"},
    "run_folder": {"config_error"},
    "sweep": {"disk", "callbacks", "config_files", "pipeline", "stage_files"},
    "stage_files": {"models"},
    "doctor_stages": {"config_error", "pipeline"},
    "exporting": {"callbacks", "config_error", "lightning_cli", "models", "modules"},
    "commands": {
        "callbacks",
        "chat",
        "exporting",
        "config_error",
        "model_folder",
        "named_code",
        "own_modules",
        "parser",
        "pipeline",
        "sweep",
        "report",
        "cli",
    },
    "lightning_cli": {
        *("data", "models", "modules", "rewards", "callbacks", "doctor", "doctor_stages"),
        *("config_error", "config_files", "config_lists", "named_code", "own_modules", "parser", "run_folder"),
        *("ending", "key_help", "model_folder", "quiet"),
    },
    "ending": set(),
    "quiet": set(),
    "key_help": {"callbacks", "config_error", "config_files", "keys"},
    "cli": {"commands", "config_error", "config_files", "lightning_cli", "parser"},
    "versions": set(),
    "__main__": {"cli", "versions"},
    "__init__": {"data", "models", "modules", "rewards", "rollout", "versions"},
}


# What touches input from outside; they import nothing of lit_align, and every room may import them.
GUARDS = {"claim", "display", "limits", "names", "owned", "secret", "stopping"}
BELOW |= {guard: set() for guard in GUARDS}


def room(path: Path) -> str:
    relative = path.relative_to(PACKAGE)
    return relative.parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Rooms of lit_align that a file imports, inside functions too; for type checking alone does not count."""
    tree = ast.parse(path.read_text())
    guarded = {
        id(node)
        for test in ast.walk(tree)
        if isinstance(test, ast.If) and getattr(test.test, "id", "") == "TYPE_CHECKING"
        for node in ast.walk(test)
    }
    names: list[str] = []
    for node in ast.walk(tree):
        if id(node) in guarded:
            continue
        if isinstance(node, ast.ImportFrom) and node.module:
            names += [
                f"{node.module}.{alias.name}" if node.module == "lit_align" else node.module for alias in node.names
            ]
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
    return {name.split(".")[1] for name in names if name.startswith("lit_align.")} - {"__version__"}


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    here = room(path)
    assert here in BELOW, f"{here} is a new room: say what it may import"
    assert imports(path) - {here} <= BELOW[here] | GUARDS


@pytest.mark.parametrize("path", sorted((PACKAGE / "functional").glob("*.py")), ids=lambda path: path.name)
def test_functional_is_pure(path: Path) -> None:
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        assert not [name for name in names if name.split(".")[0] in ("lightning", "transformers", "datasets")]
        # No choice of a device either.
        assert not (isinstance(node, ast.Attribute) and node.attr in ("cuda", "cpu"))


def test_modules_stay_readable() -> None:
    """Ten minutes a method, an afternoon for the house."""
    for path in FILES:
        lines = len(path.read_text().splitlines())
        # Sweeps and pipelines hold a format and its runs; the two base classes hold all that their kind shares.
        longer = {
            "sweep.py": 420,
            "pipeline.py": 440,
            "data/base.py": 500,
            "modules/base.py": 460,
            "modules/ppo.py": 390,
            "lightning_cli.py": 440,
        }
        limit = next((room for name, room in longer.items() if str(path).endswith(f"/{name}")), 360)
        assert lines <= limit, (path, lines)
    for method in ("sft", "reward", "dpo"):
        assert len((PACKAGE / "modules" / f"{method}.py").read_text().splitlines()) <= 170


def test_the_name_of_a_method_repeats_in_every_layer() -> None:
    for method in ("sft", "reward", "dpo", "ppo"):
        assert (PACKAGE / "functional" / f"{method}.py").exists()
        assert (PACKAGE / "modules" / f"{method}.py").exists()
        assert (PACKAGE.parent / "experiments" / "sandbox" / f"{method}.yaml").exists()
