from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from data.chats import scratch

from lit_align.data.rows import Row, Tally
from lit_align.data.source import Source


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIT_ALIGN_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    scratch().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, Any], str]:
    """Write text, bytes or rows under a name that tells the format; returns the path."""

    def written(name: str, content: Any) -> str:
        path = tmp_path / name
        if isinstance(content, list):
            lines = [json.dumps(row, ensure_ascii=False) for row in content]
            content = "".join(f"{line}\n" for line in lines) if ".jsonl" in name else f"[{','.join(lines)}]"
        content = content.encode() if isinstance(content, str) else content
        path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
        return str(path)

    return written


@pytest.fixture
def read() -> Callable[..., tuple[list[Row], Tally]]:
    """All rows of a source, and what happened to them."""

    def everything(on_bad_row: str = "error", **source: Any) -> tuple[list[Row], Tally]:
        tally = Tally()
        return [row for _, row in Source(**source).read(on_bad_row, tally)], tally

    return everything
