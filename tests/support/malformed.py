"""Files and configurations as they should not be, drawn by hypothesis from ones that are well."""

from __future__ import annotations

import bz2
import copy
import csv
import gzip
import io
import json
import lzma
from typing import Any, NamedTuple

import pyarrow
import pyarrow.parquet
import yaml
from hypothesis import strategies as st

TURNS = [{"role": "user", "content": "say a bee"}, {"role": "assistant", "content": "a bee"}]
ROWS: dict[str, dict[str, Any]] = {
    "alpaca": {"instruction": "say a bee", "input": "", "output": "a bee"},
    "messages": {"messages": TURNS},
    "sharegpt": {"conversations": [{"from": "human", "value": "a?"}, {"from": "gpt", "value": "a"}]},
    "prompt_completion": {"prompt": "say a bee", "completion": "a bee"},
    "pairs": {"prompt": "say a bee", "chosen": "a bee", "rejected": "no"},
    "conversations": {"chosen": TURNS, "rejected": [TURNS[0], {"role": "assistant", "content": "no"}]},
    "hh": {"chosen": "\n\nHuman: a?\n\nAssistant: a", "rejected": "\n\nHuman: a?\n\nAssistant: b"},
    "rankings": {"prompt": TURNS[:1], "completions": ["a bee", "no", "sea"], "ranks": [0, 2, 1]},
    "oasst": {
        "prompt": {
            "role": "prompter",
            "text": "a?",
            "replies": [{"role": "assistant", "text": t, "rank": r} for t, r in (("a", 0), ("b", 1))],
        }
    },
    "instances": {"instruction": "say", "instances": [{"input": "a", "output": "a bee"}]},
    "text": {"text": "a bee sea"},
}

# What stands where something else should.
ODD: list[Any] = [
    None, True, 0, -1, 7.5, float("nan"), float("inf"), 10**400, "", " ", "\x00", "\ud800", "﻿", [], {}, [[]], [None],
    [{}], {"role": "user"}, [{"role": "assistant"}], [{"role": "robot", "content": "x"}], [{"content": "x"}],
    [{"role": None, "content": 1}], "é" * 50, "{", "null", [0, 1], ["", ""], {"a": {"b": []}},
]  # fmt: skip


@st.composite
def changed(draw: st.DrawFn, value: Any) -> Any:
    """A nested value with something in it replaced, removed, renamed or doubled."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 2))):
        here, path = value, []
        while isinstance(here, (dict, list)) and here and (not path or draw(st.booleans())):
            key = draw(st.sampled_from(sorted(here, key=str) if isinstance(here, dict) else range(len(here))))
            path.append((here, key))
            here = here[key]
        if not path:
            return draw(st.sampled_from(ODD))
        holder, key = path[-1]
        how = draw(st.sampled_from(("replace", "replace", "remove", "rename", "double")))
        if how == "replace":
            holder[key] = copy.deepcopy(draw(st.sampled_from(ODD)))
        elif how == "remove":
            holder.pop(key)
        elif isinstance(holder, list):
            holder.append(copy.deepcopy(holder[key]))
        elif how == "rename":
            holder[draw(st.sampled_from((f"{key}s", str(key).upper(), "", "nmae", "class_path", "init_args")))] = (
                holder.pop(key)
            )
        else:
            holder[f"{key}2"] = copy.deepcopy(holder[key])
    return value


def written(kind: str, rows: list[Any]) -> bytes:
    """Rows as a file."""
    if kind == "jsonl":
        return "".join(json.dumps(row) + "\n" for row in rows).encode("utf-8", "surrogatepass")
    if kind == "json":
        return json.dumps(rows).encode()
    flat = [{k: v if isinstance(v, str) else json.dumps(v) for k, v in row.items()} for row in rows]
    if kind == "parquet":
        sink = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([clean(row) for row in flat]), sink)
        return sink.getvalue()
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(list(flat[0]))
    writer.writerows([list(row.values()) for row in flat])
    return text.getvalue().encode("utf-8", "surrogatepass")


def clean(row: dict[str, str]) -> dict[str, str]:
    """Text that Arrow takes."""
    return {k: v.encode("utf-8", "replace").decode() for k, v in row.items()}


COMPRESSED = {"": bytes, ".gz": lambda raw: gzip.compress(raw, mtime=0), ".bz2": bz2.compress, ".xz": lzma.compress}


@st.composite
def damaged(draw: st.DrawFn, raw: bytes) -> bytes:
    """Bytes that were cut, that begin with a mark, hold zeros, an endless line, or noise."""
    how = draw(st.sampled_from("none cut mark utf16 zeros within noise line empty blank cr".split()))
    at = draw(st.integers(0, max(len(raw) - 1, 0)))
    if how == "cut":
        return raw[:at]
    if how == "mark":
        return b"\xef\xbb\xbf" * draw(st.integers(1, 2)) + raw
    if how == "utf16":
        return raw.decode("utf-8", "replace").encode("utf-16")
    if how == "zeros":
        return bytes(len(raw))
    if how == "within":
        return raw[:at] + bytes(draw(st.integers(1, 40))) + raw[at:]
    if how == "noise":
        return raw[:at] + draw(st.binary(min_size=1, max_size=30)) + raw[at:]
    if how == "line":  # at times of ten million characters
        size = draw(st.sampled_from((200_000, 200_000, 200_000, 200_000, 10_000_000)))
        return raw[:at] + b"x" * size + raw[at:]
    if how == "blank":
        return raw.replace(b"\n", b"\n\n \n") + b"\n\n"
    if how == "cr":
        return raw.replace(b"\n", b"\r")
    return b"" if how == "empty" else raw


class Malformed(NamedTuple):
    """A file's name and what it holds."""

    name: str
    raw: bytes

    def __repr__(self) -> str:
        return f"{self.name}, {len(self.raw)} bytes: {self.raw[:600]!r}"


@st.composite
def files(draw: st.DrawFn) -> Malformed:
    """A file."""
    name = draw(st.sampled_from(sorted(ROWS)))
    kind = draw(st.sampled_from(("jsonl", "jsonl", "jsonl", "json", "csv", "parquet", "txt")))
    rows = [ROWS[name]] * draw(st.integers(1, 3))
    if kind in ("json", "jsonl"):
        bad = draw(changed(ROWS[name]))
        rows.insert(draw(st.integers(0, len(rows))), bad)
    raw = written("jsonl" if kind == "txt" else kind, rows)
    if draw(st.booleans()):
        raw = draw(damaged(raw))
    ending = draw(st.sampled_from(("", "", "", ".gz", ".bz2", ".xz")))
    raw = COMPRESSED[ending](raw)
    if ending and draw(st.booleans()) and len(raw) < 100_000:
        raw = draw(damaged(raw))
    return Malformed(f"rows.{kind}{ending}", raw)


@st.composite
def configurations(draw: st.DrawFn, sources: list[str]) -> str:
    """The text of a YAML file."""
    text = draw(st.sampled_from(sources))
    if draw(st.integers(0, 3)):
        try:
            return yaml.safe_dump(draw(changed(yaml.safe_load(text))), allow_unicode=draw(st.booleans()))
        except yaml.YAMLError:
            pass
    at = draw(st.integers(0, len(text)))
    piece = st.sampled_from(
        ("\x00", "\t", "{", "[", ": ", "\n- ", "﻿", "&a ", "*a ", "!!python/object:os.system ", "'", "? ", "%", "\n")
    )
    return text[:at] + draw(piece) + text[at + draw(st.integers(0, 20)) :]
