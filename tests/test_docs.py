"""The documentation: every page is reachable, and its commands run as they stand, in order, on a tiny model."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from support.documentation import BEFORE, FILES, Block, blocks, place

import lit_align
from lit_align.cli import main

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
README = ROOT / "README.md"


def test_every_page_is_in_the_navigation() -> None:
    # Material's configuration holds tags that a plain loader does not know; the list of pages does not.
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text().split("nav:\n")[1])

    def files(entries: list) -> set[str]:
        found: set[str] = set()
        for entry in entries:
            for value in entry.values():
                found |= files(value) if isinstance(value, list) else {value}
        return found

    assert files(site) == {page.name for page in PAGES}


def test_the_architecture_page_lists_the_rooms() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text().partition("## Contracts")[0]
    rooms = {path.parent.name for path in (ROOT / "lit_align").glob("*/__init__.py")}
    assert {name.strip("/") for name in re.findall(r"^\| `([\w/.]+)` \|", text, re.MULTILINE)} == {*rooms, "types.py"}


@pytest.mark.parametrize("page", [README, *PAGES], ids=lambda page: page.stem)
def test_every_yaml_block_is_yaml(page: Path) -> None:
    for block in blocks(page):
        if block.language == "yaml":
            assert yaml.safe_load(block.text), block.title


@pytest.mark.parametrize("page", [README, *PAGES], ids=lambda page: page.stem)
def test_every_python_block_is_python(page: Path) -> None:
    for block in blocks(page):
        if block.language == "python":
            compile(block.text, block.title or page.name, "exec")


RUN = [page for page in [README, *PAGES] if any(block.language == "bash" for block in blocks(page))]


@pytest.mark.slow
@pytest.mark.parametrize("page", RUN, ids=lambda page: page.stem)
def test_every_command_runs_in_order(page: Path, tmp_path: Path) -> None:
    place(tmp_path)
    scripts = Path(sys.executable).parent
    environment = {**os.environ, "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}"}
    before = [Block("bash", "", command) for command in BEFORE.get(page.stem, [])]
    files = [*FILES, *(block for block in blocks(ROOT / "docs" / "your-model.md") if block.title)] if before else []
    for block in [*files, *before, *blocks(page)]:
        if block.title:
            (tmp_path / block.title).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / block.title).write_text(block.text)
        # .ci/run runs the two commands that install.
        elif block.language == "bash" and "pip install" not in block.text:
            command = ["bash", "-eu", "-c", block.text]
            done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
            assert done.returncode == 0, f"{page.name}:\n{block.text}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"


def test_the_api_page_has_every_public_name() -> None:
    entries = re.findall(r"^::: [\w.]*\.(\w+)$", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE)
    missing = {name for name in lit_align.__all__ if not name.startswith("__")} - set(entries)
    assert not missing, "add `::: lit_align.ROOM.FILE.NAME` to docs/api.md"


def test_the_page_of_the_command_line_has_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--help"])
    listed = re.findall(r"^  ([a-z][\w, ]*?)(?: [A-Z]| {2,})", capsys.readouterr().out, re.MULTILINE)
    commands = {command for names in listed for command in names.split(", ")}
    assert {"fit", "doctor", "report"} <= commands
    page = (ROOT / "docs" / "command-line.md").read_text().partition("## Short forms")[0]
    assert [command for command in sorted(commands) if not re.search(rf"\b{command}\b", page)] == []
