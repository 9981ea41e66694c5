"""The two constraints files: the lowest and the highest versions that pyproject.toml allows."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
REQUIREMENTS = [Requirement(text) for text in (*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"])]


def pinned(name: str) -> dict[str, Version]:
    lines = [line for line in (ROOT / "docker" / name).read_text().splitlines() if not line.startswith("#")]
    pairs = [line.split("==") for line in lines]
    return {canonicalize_name(package): Version(version) for package, version in pairs}


def bounds(requirement: Requirement) -> dict[str, Version]:
    return {part.operator: Version(part.version) for part in requirement.specifier}


def test_the_lowest_are_the_lower_bounds() -> None:
    lowest = pinned("constraints-lowest.txt")
    for requirement in REQUIREMENTS:
        if requirement.specifier:
            assert lowest[canonicalize_name(requirement.name)] == bounds(requirement)[">="], requirement


def test_the_highest_are_allowed_and_complete() -> None:
    highest = pinned("constraints.txt")
    for requirement in REQUIREMENTS:
        assert requirement.specifier.contains(highest[canonicalize_name(requirement.name)]), requirement


def test_extras_that_tests_run_with_are_pinned() -> None:
    highest = pinned("constraints.txt")
    for extra in ("deepspeed", "liger", "annotate"):
        for requirement in map(Requirement, PROJECT["optional-dependencies"][extra]):
            assert requirement.specifier.contains(highest[canonicalize_name(requirement.name)]), requirement


def test_the_metadata_names_what_is_supported() -> None:
    named = re.findall(r"Programming Language :: Python :: (3\.\d+)", "\n".join(PROJECT["classifiers"]))
    low, high = re.fullmatch(r">=3\.(\d+),<3\.(\d+)", PROJECT["requires-python"]).groups()
    assert named == [f"3.{minor}" for minor in range(int(low), int(high))]
