"""The READMEs: every number comes from a result file, links lead somewhere, and the README stays short."""

from __future__ import annotations

import importlib.util
import json
import operator
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "experiments").glob("*/README.md"))]
# A figure: with a decimal point, a sign, or a unit. Not a part of a name (Pythia-1.4B), a path or a version of TRL.
FIGURE = re.compile(
    r"(?<![\w.\-+/])(?:[+\-]?\d+\.\d+|[+\-]\d+|\d[\d,]*(?= ?(?:%|x\b|MB\b|times\b|seconds\b|minutes\b|hours\b)))"
    r"(?![\w/]|\.\d)"
)


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


def loaded(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """experiments/write_numbers.py as a module; its sys.path is undone after the test."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    spec = importlib.util.spec_from_file_location("write_numbers", ROOT / "experiments" / "write_numbers.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules.pop("table", None)
    return module


@pytest.fixture
def write_numbers(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return loaded(monkeypatch)


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_numbers_are_those_of_the_result_files(page: Path, write_numbers: ModuleType) -> None:
    text = page.read_text()
    assert write_numbers.filled(text) == text, "run python experiments/write_numbers.py"


def test_a_changed_number_is_found(write_numbers: ModuleType) -> None:
    text = README.read_text()
    for changed in (text.replace("+0.40", "+0.54"), text.replace("about 7 minutes", "about 5 minutes")):
        assert changed != text
        assert write_numbers.filled(changed) == text
    with pytest.raises(KeyError, match="nothing"):
        write_numbers.filled("<!-- numbers: nothing -->1<!-- /numbers -->")


def test_every_block_is_used(write_numbers: ModuleType) -> None:
    used = {found[1] for page in PAGES for found in write_numbers.BLOCK.findall(page.read_text())}
    assert used == set(write_numbers.BLOCKS)


def outside(text: str, write_numbers: ModuleType) -> list[str]:
    """The lines of a page that no block and no fence holds, without links' targets and code."""
    text = re.sub(r"^```.*?^```$", "", write_numbers.BLOCK.sub("", text), flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"`[^`\n]*`|\]\([^)]*\)", "", text).splitlines()


def test_no_figure_of_the_readme_stands_outside_of_a_block(write_numbers: ModuleType) -> None:
    found = [line for line in outside(README.read_text(), write_numbers) if FIGURE.search(line)]
    assert found == []


# The recipes' tables hold cited settings, not results.
@pytest.mark.parametrize("page", [page for page in PAGES[1:] if page.parent.name != "recipes"], ids=named)
def test_no_figure_of_a_table_stands_outside_of_a_block(page: Path, write_numbers: ModuleType) -> None:
    rows = [line for line in outside(page.read_text(), write_numbers) if line.startswith("|")]
    assert [row for row in rows if FIGURE.search(row)] == []


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("gold +0.40 over SFT", True),
        ("4.32 times TRL's", True),
        ("gains 0.53.", True),
        ("takes 7 minutes", True),
        ("1,354 MB", True),
        ("a share of 72 %", True),
        ("Qwen2.5-0.5B and Pythia-1.4B", False),
        ("Apache-2.0", False),
        ("Ziegler 2019, eq. 2", False),
        ("2 CPU cores", False),
    ],
)
def test_what_counts_as_a_figure(text: str, seen: bool) -> None:
    assert bool(FIGURE.search(text)) is seen


def test_the_readme_is_short_and_begins_with_its_two_commands() -> None:
    text = README.read_text()
    assert len(text.splitlines()) <= 120
    fences = re.findall(r"^```(\S*).*\n((?:.*\n)*?)^```$", text, re.MULTILINE)
    assert [language for language, _ in fences[:2]] == ["bash", "bash"]
    assert "lit-align demo --out" in fences[0][1]
    assert "pytest -q" in fences[1][1]


@pytest.mark.parametrize("page", [*PAGES, ROOT / "experiments" / "README.md"], ids=named)
def test_links_lead_to_files(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", re.sub(r"\s+", " ", page.read_text()))
    assert [link for link in links if "://" not in link and not (page.parent / link).exists()] == []


def test_what_is_asked_of_the_seeds_holds() -> None:
    """The page claims that every line holds in every seed."""
    rows = json.loads((ROOT / "experiments" / "sandbox" / "results" / "seeds.json").read_text())["rows"]
    compare = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}
    asked = [row for row in rows if row["asked"]]
    assert len(asked) >= 10
    for row in asked:
        sign, bound = row["asked"].split()
        assert all(compare[sign](value, float(bound)) for value in row["values"]), row["title"]
