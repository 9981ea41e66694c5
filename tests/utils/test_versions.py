"""Dependencies: what is imported is declared, and a version that does not work is named in one line."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import lit_align
from lit_align.utils import versions

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def imported() -> dict[str, Path]:
    """Top-level modules that the package imports, inside functions too, and a file that does."""
    found = {}
    for file in sorted((ROOT / "lit_align").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module and not node.level else []
            found.update({name.split(".")[0]: file for name in names})
    return found


def test_every_import_is_declared() -> None:
    extras = PROJECT["optional-dependencies"]
    lines = [*PROJECT["dependencies"], *(line for extra in extras.values() for line in extra)]
    declared = {canonicalize_name(Requirement(line).name) for line in lines}
    owners = metadata.packages_distributions()
    for module, file in imported().items():
        if module in sys.stdlib_module_names or module == "lit_align":
            continue
        # An extra that is not installed has no owner here: its module is named like it.
        names = {canonicalize_name(name) for name in owners.get(module, [module])}
        assert names & declared, f"{file} imports {module}, which pyproject.toml does not declare"


def test_every_dependency_has_an_upper_bound() -> None:
    for line in PROJECT["dependencies"]:
        operators = {part.operator for part in Requirement(line).specifier}
        assert "<" in operators, line


def test_the_newest_bounds_hold_the_tested_versions() -> None:
    tested = versions.tested()
    for line in PROJECT["dependencies"]:
        requirement = Requirement(line)
        assert requirement.specifier.contains(tested[canonicalize_name(requirement.name)]), line


@pytest.fixture
def broken(tmp_path: Path) -> dict[str, str]:
    """An environment in which the newest release of jsonargparse cannot be imported, and says it is 99.0."""
    (tmp_path / "jsonargparse").mkdir()
    (tmp_path / "jsonargparse" / "__init__.py").write_text("raise AttributeError('module has no attribute Old')\n")
    info = tmp_path / "jsonargparse-99.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: jsonargparse\nVersion: 99.0\n")
    (info / "RECORD").write_text("jsonargparse/__init__.py,,\n")
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])}


def test_a_broken_release_is_one_line_that_says_what_was_tested(broken: dict[str, str]) -> None:
    command = [sys.executable, "-m", "lit_align", "fit", "--print_config"]
    done = subprocess.run(command, env=broken, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert len(done.stderr.strip().splitlines()) == 1
    assert "jsonargparse 99.0 (tested: " in done.stderr
    assert f"pip install 'jsonargparse=={versions.tested()['jsonargparse']}'" in done.stderr


def test_a_broken_release_is_named_to_python_too(broken: dict[str, str]) -> None:
    # The door that every public name goes through.
    script = "import lit_align; lit_align._WHERE['Broken'] = 'cli'; lit_align.Broken"
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=broken, cwd=ROOT, capture_output=True, text=True, check=False)
    assert "lit_align: installed versions that were not tested: jsonargparse 99.0" in done.stderr


def test_an_error_in_the_tested_versions_is_not_blamed_on_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "tested", lambda: {})
    monkeypatch.setattr(versions, "outside", list)
    assert versions.advice(TypeError("a bug of ours")) is None


def test_an_error_raised_in_a_dependency_names_its_version(monkeypatch: pytest.MonkeyPatch) -> None:
    import yaml

    monkeypatch.setattr(versions, "tested", lambda: {"pyyaml": "1.0"})
    monkeypatch.setattr(versions, "outside", list)
    with pytest.raises(yaml.YAMLError) as caught:
        yaml.safe_load("[")
    said = versions.advice(caught.value)
    assert said is not None
    assert said.startswith("installed versions that were not tested: pyyaml ")
    assert "pip install 'pyyaml==1.0'" in said


def test_the_package_knows_its_own_requirements() -> None:
    assert "torch" in versions.requirements()
    assert Path(lit_align.__file__).parent == versions.PACKAGE
