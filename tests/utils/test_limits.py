"""Limits on what is read: YAML that multiplies or nests without end, files that are none, grids without end."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from lit_align.__main__ import entry
from lit_align.cli.entry import main
from lit_align.config.named_files import check_files
from lit_align.pipeline.stages import load_yaml
from lit_align.pipeline.sweep import Sweep
from lit_align.utils import limits

LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n"
    for before, name in zip("abcdefghi", "bcdefghij", strict=True)
)
HOSTILE = {
    "aliases that multiply": (LAUGHS, "more than 100,000 values"),
    "in mappings": (LAUGHS.replace("[", "{k: [").replace("]", "]}"), "more than 100,000 values"),
    "merged": (
        "a: &a {x0: 1, x1: 1}\n"
        + "".join(
            f"{n}: &{n} {{<<: [{', '.join([f'*{b}'] * 10)}]}}\n" for b, n in zip("abcdefghi", "bcdefghij", strict=True)
        ),
        "more than 100,000 values",
    ),
    "a long text, often": ("a: &a " + "x" * 100_000 + "\nb: [" + ", ".join(["*a"] * 1000) + "]", "bytes"),
    "itself": ("model: &m {init_args: *m}", "is inside its own anchor"),
    "itself, in a list": ("model: &m [1, [*m]]", "is inside its own anchor"),
    "itself, as a key": ("&m {? [*m] : 1}", "is inside its own anchor"),
    "deep": ("model: " + "[" * 300 + "]" * 300, "nested more than 100 deep"),
    "deep, and not closed": ("model: " + "[" * 100_000, "nested more than 100 deep"),
    "deep, by lines": ("\n".join(" " * i + "a:" for i in range(300)), "nested more than 100 deep"),
    "deep, by aliases": (
        "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}]\n" for i in range(1, 200)),
        "nested more than 100 deep",
    ),
    "a key twice": ("model: {a: 1, b: {c: [2]}, a: 3}", "the key 'a' is given twice: remove one"),
    "a key twice, by lines": ("out: a\nmodel:\n  b: 1\nout: b\n", "line 4: the key 'out' is given twice"),
    "no date": ("model: 2024-13-45", "a value cannot be read"),
    "digits": ("model: " + "9" * 5000, "a value cannot be read"),
}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_yaml_is_one_line(name: str, place: Path) -> None:
    text, says = HOSTILE[name]
    (place / "run.yaml").write_text(text)
    (place / "pipeline.yaml").write_text(yaml.safe_dump({"root": "runs/p", "stages": {"one": {"call": "run.yaml"}}}))
    (place / "sweep.yaml").write_text(text)
    commands = ["fit -c run.yaml", "doctor run.yaml", "pipeline run.yaml", "pipeline pipeline.yaml", "sweep sweep.yaml"]
    started = time.monotonic()
    for command in commands:
        with pytest.raises(ValueError, match=says) as told:
            main(command.split())
        assert "\n" not in str(told.value)
        assert ".yaml" in str(told.value)
    assert time.monotonic() - started < 20
    assert not (place / "runs").exists()


def test_hostile_values_on_the_command_line_are_one_line(place: Path) -> None:
    for text, says in HOSTILE.values():
        if "\n" not in text and len(text) < 50_000 and "cannot be read" not in says:
            value = text.removeprefix("model: ")
            with pytest.raises(ValueError, match=says) as told:
                main(["fit", "--model", value])
            assert "\n" not in str(told.value)


def test_a_file_of_a_value_is_read_within_the_limits(place: Path) -> None:
    """jsonargparse takes the name of a file for a class."""
    (place / "model.yaml").write_text(LAUGHS)
    (place / "run.yaml").write_text("model: model.yaml\n")
    with pytest.raises(ValueError, match="more than 100,000 values"):
        main(["fit", "-c", "run.yaml"])


def test_ordinary_aliases_are_read(place: Path) -> None:
    text = "a: &a {x: 1, y: [1, 2]}\nb: {<<: *a, y: 3}\nc: [*a, *a]\nd: &d text\ne: *d\n"
    assert limits.load_yaml(text) == yaml.safe_load(text)
    for file in Path(__file__).parents[2].rglob("experiments/**/*.yaml"):
        assert limits.load_yaml(limits.read_text(file), file) == yaml.safe_load(file.read_text())


def test_a_large_or_binary_file_is_no_configuration(place: Path) -> None:
    (place / "run.yaml").write_bytes(b"# " + b"x" * limits.MAX_BYTES)
    with pytest.raises(ValueError, match=r"run\.yaml holds more than"):
        main(["fit", "-c", "run.yaml"])
    (place / "run.yaml").write_bytes(b"model: \xff\xfe")
    for command in ("fit -c run.yaml", "pipeline run.yaml", "sweep run.yaml"):
        with pytest.raises(ValueError, match=r"run\.yaml is not UTF-8"):
            main(command.split())


@pytest.fixture(params=["pipe", "socket", "device"])
def special(request: pytest.FixtureRequest, place: Path) -> Iterator[tuple[str, str]]:
    if request.param == "pipe":
        os.mkfifo(place / "special.yaml")
        yield "special.yaml", "a named pipe"
    elif request.param == "device":
        (place / "special.yaml").symlink_to("/dev/zero")
        yield "special.yaml", "a device"
    else:
        server = socket.socket(socket.AF_UNIX)
        server.bind("special.yaml")
        yield "special.yaml", "a socket"
        server.close()


def test_what_is_no_file_is_not_read(special: tuple[str, str], place: Path) -> None:
    name, what = special
    (place / "pipeline.yaml").write_text(yaml.safe_dump({"root": "runs/p", "stages": {"one": {"call": name}}}))
    (place / "value.yaml").write_text(f"model: {name}\n")
    rows = {"class_path": "lit_align.InstructionDataModule", "init_args": {"tokenizer": "x", "train": [{"path": name}]}}
    (place / "rows.yaml").write_text(yaml.safe_dump({"data": rows}))
    for command in (
        f"fit -c {name}", f"doctor {name}", f"pipeline {name}", "pipeline pipeline.yaml", f"sweep {name}",
        "fit -c value.yaml", "fit -c rows.yaml", f"fit --model={name}", f"fit --data {name}",
    ):  # fmt: skip
        with pytest.raises(ValueError, match=what):
            main(command.split())


def test_streams_are_no_files_to_read(place: Path) -> None:
    assert not list(limits.no_files({"a": "/dev/null", "b": ["/dev/stderr", "/tmp", "x" * 9000, "a\x00b", ""]}))
    check_files(["fit", "--out", "/dev/null"])


GRID = {
    "method": "grid",
    "metric": {"name": "val/loss"},
    "parameters": {f"p{i}": {"values": list(range(100))} for i in range(8)},
    "command": ["lit-align", "fit", "${args}"],
}


def test_a_grid_is_counted_before_it_is_built(place: Path) -> None:
    file = place / "sweep.yaml"
    file.write_text(yaml.safe_dump(GRID))
    with pytest.raises(ValueError, match=r"10,000,000,000,000,000 points"):
        Sweep(file)
    assert len(Sweep(file, count=5).points) == 5
    # The same value a hundred times is one: the second point of a grid would never come.
    file.write_text(yaml.safe_dump({**GRID, "parameters": {f"p{i}": {"values": [1] * 100} for i in range(8)}}))
    assert len(Sweep(file).points) == 1
    assert len(Sweep(file, count=5).points) == 1
    file.write_text(yaml.safe_dump({**GRID, "parameters": {"p": {"min": 0, "max": 10**12}}}))
    for count in (None, 5):
        with pytest.raises(ValueError, match="values, more than"):
            Sweep(file, count=count)
    file.write_text(yaml.safe_dump({**GRID, "method": "random", "run_cap": 10**12}))
    with pytest.raises(ValueError, match="run_cap"):
        Sweep(file)


def test_rounds_are_counted(place: Path) -> None:
    stages = {"up": {"rounds": 10**9, "stages": {"a": {"call": "a.yaml"}}}}
    (place / "pipeline.yaml").write_text(yaml.safe_dump({"root": "runs/p", "stages": stages}))
    with pytest.raises(ValueError, match="rounds, expected a number from 1 to"):
        main(["pipeline", "pipeline.yaml"])


def test_an_odd_card_beside_a_model_stops_nothing(place: Path) -> None:
    from lit_align.callbacks.card import _front_of, _read

    for text in (LAUGHS, "[" * 300, "a: *b", "a: 2024-13-45"):
        (place / "README.md").write_text(f"---\n{text}\n---\n")
        assert _front_of(place) == {}
        (place / "config.yaml").write_text(text)
        assert _read(place, "config.yaml") == {}
    os.remove(place / "README.md")
    os.mkfifo(place / "README.md")
    assert _front_of(place) == {}


def test_the_message_ends_the_command(
    place: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (place / "run.yaml").write_text(LAUGHS)
    monkeypatch.setattr("sys.argv", ["lit-align", "fit", "-c", "run.yaml"])
    assert entry() == 1
    assert capsys.readouterr().err.startswith("lit-align: run.yaml, line ")
    assert load_yaml  # the other entrance


def test_json_of_a_run_is_read_within_the_limits(place: Path) -> None:
    folder = place / "run"
    folder.mkdir()
    for text in ("[" * 100_000, "[1]", "{", '"text"'):
        (folder / "summary.json").write_text(text)
        with pytest.raises(ValueError, match=r"summary\.json"):
            main(["report", "run"])
    (folder / "summary.json").unlink()
    os.mkfifo(folder / "summary.json")
    with pytest.raises(ValueError, match="a named pipe"):
        main(["report", "run"])
    with pytest.raises(ValueError, match="nested too deeply"):
        main(["pipeline", "pipeline.yaml", "--set", "a.b=" + "[" * 100_000])


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors", "adapter_config.json"])
def test_a_pipe_in_a_models_folder_is_not_read(name: str, place: Path) -> None:
    from support.tiny import tiny_folder

    from lit_align import Network
    from lit_align.models import load_causal_lm, load_tokenizer

    folder = Path(tiny_folder(place / "model"))
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    for load in (load_tokenizer, lambda folder: load_causal_lm(Network(folder))):
        with pytest.raises(ValueError, match="a named pipe"):
            load(str(folder))


@pytest.mark.parametrize("value", ["\x1b[2J", "a\x00b", "caf\udce9", "\x9b", "\x7f"])
def test_what_no_yaml_takes_is_one_line(value: str) -> None:
    for words in (["fit", f"--model.network.name={value}"], ["fit", "--out", value], ["doctor", value]):
        with pytest.raises(ValueError, match=r"control characters|does not exist") as told:
            main(words)
        assert "\n" not in str(told.value)
