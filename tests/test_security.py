"""Nothing is run that came with data, nothing is written outside a folder, and nobody is called who was not named."""

from __future__ import annotations

import ast
import io
import json
import pickle
import socket
import zipfile
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
import yaml
from support.configs import config
from support.parsers import only
from support.runs import write_rows
from support.tiny import tiny_folder

from lit_align import Network, Source
from lit_align.callbacks import AtomicCheckpointIO
from lit_align.cli.chatting import Chat
from lit_align.cli.entry import main
from lit_align.data.rows import Tally
from lit_align.models import load_causal_lm

ROOT = Path(__file__).parents[1]
CODE = sorted([*(ROOT / "lit_align").rglob("*.py"), *(ROOT / "experiments").rglob("*.py")])


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Who is looked up or connected to; nobody answers."""
    names: list[str] = []

    def refuse(*arguments: Any, **options: Any) -> None:
        address = arguments[1] if isinstance(arguments[0], socket.socket) else arguments[0]
        names.append(str(address[0] if isinstance(address, tuple) else address))
        raise OSError("no network here")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket.socket, "connect_ex", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    return names


@pytest.mark.parametrize("method", ["sft", "reward", "dpo", "ppo"])
def test_a_run_calls_nobody(method: str, called: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    only("fit", monkeypatch)
    write_rows(tmp_path)
    folder = tiny_folder(tmp_path / "model")
    content = config(method, folder, tmp_path, tmp_path / "run", max_steps=4 if method == "ppo" else 1)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(content))
    main(["fit", "-c", str(tmp_path / "run.yaml")])
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()
    assert called == []


def test_a_model_of_the_hub_is_asked_for_by_name_alone(called: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """And the fixture above would have noticed."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between the attempts
    with pytest.raises(ValueError, match="someone/somemodel"):
        load_causal_lm(Network("someone/somemodel"))
    assert set(called) == {"huggingface.co"}


def calls(path: Path) -> list[ast.Call]:
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]


@pytest.mark.parametrize("path", CODE, ids=lambda path: str(path.relative_to(ROOT)))
def test_code_loads_nothing_that_could_run(path: Path) -> None:
    for call in calls(path):
        name, options = ast.unparse(call.func), {k.arg: k.value for k in call.keywords}
        assert name not in ("eval", "exec", "pickle.load", "pickle.loads", "yaml.load", "os.system"), (
            name,
            call.lineno,
        )
        assert not name.endswith((".extractall", ".extract", "unpack_archive")), (name, call.lineno)
        if name == "torch.load":
            given = options.get("weights_only")
            asked = isinstance(given, ast.Name)  # handed through
            assert asked or (isinstance(given, ast.Constant) and given.value is True), call.lineno
        trusted = options.get("trust_remote_code")
        assert not (isinstance(trusted, ast.Constant) and trusted.value), call.lineno
        # Weights as numbers, not as pickles; a tokenizer and a configuration are json.
        loads_weights = name.endswith("from_pretrained") and ("Model" in name or "auto_class" in name)
        # peft has no such option: the file is looked for before the call.
        loads_weights &= not (name == "PeftModel.from_pretrained" and path.name == "reload.py")
        assert not loads_weights or "use_safetensors" in options or "experiments" in str(path), (name, call.lineno)


def test_no_experiment_trusts_remote_code() -> None:
    for path in (ROOT / "experiments").rglob("*.yaml"):
        assert "trust_remote_code" not in path.read_text(), path


@pytest.fixture
def with_code(tmp_path: Path) -> Path:
    """A model's folder that brings code along, which leaves a trace when it runs."""
    folder = Path(tiny_folder(tmp_path / "model"))
    trace = tmp_path / "ran"
    (folder / "modeling_own.py").write_text(
        f"open({str(trace)!r}, 'w').close()\n"
        "from transformers import LlamaForCausalLM as Own, LlamaConfig as OwnConfig\n"
    )
    content = json.loads((folder / "config.json").read_text()) | {"model_type": "own"}
    content["auto_map"] = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.Own"}
    (folder / "config.json").write_text(json.dumps(content))
    return folder


def test_code_of_a_model_runs_only_where_it_is_trusted_by_name(
    with_code: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace = with_code.parent / "ran"
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))  # transformers would ask
    with pytest.raises(ValueError, match="trust_remote_code"):
        load_causal_lm(Network(str(with_code)))
    assert not trace.exists()


class _Runs:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return Path.touch, (self.trace,)


def test_a_checkpoint_runs_nothing(tmp_path: Path) -> None:
    path = tmp_path / "bad.ckpt"
    torch.save({"state_dict": {}, "pytorch-lightning_version": "2.6", "x": _Runs(tmp_path / "ran")}, path)
    with pytest.raises(ValueError, match="more than tensors and plain values"):
        AtomicCheckpointIO().load_checkpoint(path)
    assert not (tmp_path / "ran").exists()


def test_weights_as_pickles_are_refused(tmp_path: Path) -> None:
    folder = Path(tiny_folder(tmp_path / "model"))
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(_Runs(tmp_path / "ran")))
    with pytest.raises(ValueError, match="cannot load"):
        load_causal_lm(Network(str(folder)))
    with pytest.raises((OSError, ValueError)):
        Chat(str(folder))
    assert not (tmp_path / "ran").exists()


def test_an_archive_writes_nothing_wherever_its_members_point(tmp_path: Path) -> None:
    """Members are read where they lie: names that lead out of the folder lead nowhere."""
    inside = tmp_path / "inside"
    inside.mkdir()
    with zipfile.ZipFile(inside / "rows.zip", "w") as archive:
        archive.writestr("../../outside.jsonl", '{"text": "out"}\n')
        archive.writestr("/absolute.jsonl", '{"text": "out"}\n')
        archive.writestr("rows.jsonl", '{"text": "in"}\n')
    before = sorted(tmp_path.rglob("*"))
    for member in ("rows.jsonl", "*.jsonl", "../../outside.jsonl"):
        source = Source(f"zip://{member}::{inside / 'rows.zip'}")
        try:
            rows = list(source.read("error", Tally()))
        except ValueError:
            rows = []
        assert member != "rows.jsonl" or [row["text"] for _, row in rows] == ["in"]
    assert sorted(tmp_path.rglob("*")) == before
    assert not Path("/absolute.jsonl").exists()
