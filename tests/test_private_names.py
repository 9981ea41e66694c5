"""Private names of Lightning that the package leans on: few, each with its reason."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import lightning

PACKAGE = Path(__file__).parents[1] / "lit_align"
LIGHTNING = Path(inspect.getfile(lightning)).parent

# Name, and why nothing public will do. Ten at most.
REASONS = {
    "_logger_connector": "what a batch logged, before Lightning gives it to the loggers",
    "_batches_that_stepped": "the step that Lightning gives to the loggers",
    "_should_check_val_fx": "whether a validation comes next, by batches, epochs or time",
    "_data_fetcher": "the argument of `_should_check_val_fx`",
    "_find_last_checkpoints": "the one place that `Trainer.fit(ckpt_path='last')` asks",
    "_accelerator_connector": "SLURM's options on one device, where the strategy does not hold them",
    "_parse_ckpt_path": "kept from merging a checkpoint's `hyper_parameters` into the configuration",
    "_run_subcommand": "what LightningCLI calls around the Trainer's run",
    "_wrap_closure": "forward, backward and hooks without a step, which DeepSpeed's engine takes",
    "_data_parallel_size": "set when the number of processes is known; the public argument comes before",
}


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def is_self(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def defined(tree: ast.AST) -> set[str]:
    """Private names that source gives to functions, classes, variables and attributes."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_self(node.value):
            names.add(node.attr)
    return {name for name in names if private(name)}


@cache
def of_file(path: Path) -> frozenset[str]:
    return frozenset(defined(ast.parse(path.read_text())))


@cache
def of_lightning_alone() -> frozenset[str]:
    # By a pattern, as there are many files.
    given = re.compile(r"(?:\bdef +|\bclass +|\bself\.|^)(_[a-zA-Z]\w*)(?= *[(:=])", re.MULTILINE)
    theirs = frozenset(name for path in LIGHTNING.rglob("*.py") for name in given.findall(path.read_text()))
    return theirs.difference(*(of_file(path) for path in PACKAGE.rglob("*.py")))


def inherited(module: str, name: str) -> set[str]:
    """Private names of the classes of Lightning that a class of ours derives from."""
    kind = getattr(importlib.import_module(module), name)
    above = [base for base in kind.__mro__ if base.__module__.split(".")[0] == "lightning"]
    return set().union(*(defined(ast.parse(inspect.cleandoc("\n" + inspect.getsource(base)))) for base in above), set())


def uses(path: Path, module: str) -> Iterator[tuple[str, int]]:
    """Each private name of Lightning in a file, and its line."""
    text = path.read_text()
    if "lightning" not in text and "trainer" not in text:
        return
    tree = ast.parse(text)
    inside: dict[int, set[str]] = {}  # by node: what `self` inherits there
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and (names := inherited(module, node.name)):
            inside |= {id(child): names for child in ast.walk(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "lightning":
            for part in (*str(node.module).split("."), *(alias.name for alias in node.names)):
                if private(part):
                    yield part, node.lineno
        elif isinstance(node, ast.FunctionDef) and node.name in inside.get(id(node), ()):
            yield node.name, node.lineno
        elif isinstance(node, ast.Attribute) and private(node.attr):
            if is_self(node.value) or (
                isinstance(node.value, ast.Call) and getattr(node.value.func, "id", "") == "super"
            ):
                if node.attr in inside.get(id(node), ()):
                    yield node.attr, node.lineno
            elif node.attr in of_lightning_alone():
                yield node.attr, node.lineno
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "setattr", "hasattr"):
            name = getattr(node.args[1], "value", None)
            if isinstance(name, str) and private(name) and name in of_lightning_alone():
                yield name, node.lineno


def test_private_names_of_lightning_are_few_and_have_a_reason() -> None:
    found: dict[str, list[str]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.name == "__main__.py":
            continue
        relative = path.relative_to(PACKAGE.parent)
        module = ".".join(relative.with_suffix("").parts).removesuffix(".__init__")
        for name, line in uses(path, module):
            found.setdefault(name, []).append(f"{relative}:{line}")
    assert len(REASONS) <= 10
    assert found.keys() - REASONS.keys() == set(), {name: found[name] for name in found if name not in REASONS}
    assert REASONS.keys() - found.keys() == set(), "no longer used"
