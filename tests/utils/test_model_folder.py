"""The model of a run's folder, wherever a model's folder is expected."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.configs import config
from support.runs import write_rows
from support.tiny import tiny_folder

from lit_align import ModelReward, Network, PreferenceDataModule
from lit_align.cli.entry import main
from lit_align.models import load_tokenizer


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, a pipeline of three stages, and a sweep of two points, each with a model; and a run without one."""
    place = tmp_path_factory.mktemp("place")
    write_rows(place)
    tiny_folder(place / "run" / "model")
    (place / "run" / "config.yaml").touch()
    for stage in ("b", "a", "reward"):
        shutil.copytree(place / "run" / "model", place / "pipeline" / stage / "model")
    told = json.loads((place / "pipeline" / "reward" / "model" / "config.json").read_text())
    told["architectures"] = ["LlamaForSequenceClassification"]
    (place / "pipeline" / "reward" / "model" / "config.json").write_text(json.dumps(told))
    (place / "pipeline" / "data").mkdir()
    stages: dict[str, Any] = {"data": {}, "b": {}, "a": {}, "reward": {}}
    (place / "pipeline" / "manifest.json").write_text(json.dumps({"stages": stages}))
    for point in ("x", "y"):
        shutil.copytree(place / "run" / "model", place / "sweep" / point / "model")
    (place / "sweep" / "sweep.json").write_text(json.dumps({"points": [{"folder": "x"}, {"folder": "y"}]}))
    (place / "failed" / "checkpoints").mkdir(parents=True)
    (place / "failed" / "config.yaml").touch()
    (place / "failed" / "checkpoints" / "last.ckpt").touch()
    return place


def said(args: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> str:
    monkeypatch.setattr("builtins.input", lambda _: "")
    main(args)
    return capsys.readouterr().out


def test_a_chat_finds_the_model(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    def first(folder: str) -> str:
        return said(["chat", str(place / folder)], monkeypatch, capsys).splitlines()[0]

    assert first("run") == f"model: {place / 'run' / 'model'}"
    assert first("run/model").startswith("/new begins")
    # The last language model of a pipeline, in its order; the best of a sweep.
    rest = f"(others: {place / 'pipeline' / 'b' / 'model'}, {place / 'pipeline' / 'reward' / 'model'})"
    assert first("pipeline") == f"model: {place / 'pipeline' / 'a' / 'model'} {rest}"
    assert first("sweep").startswith(f"model: {place / 'sweep' / 'x' / 'model'} (others: ")


def test_networks_tokenizers_and_rewards(place: Path) -> None:
    model = str(place / "run" / "model")
    assert Network(str(place / "run")).name == model
    assert ModelReward(str(place / "run")).network.name == model
    assert len(load_tokenizer(str(place / "run"))) == len(load_tokenizer(model))
    data = PreferenceDataModule(place / "run", place / "rankings.json", cache_dir="none")
    assert len(data.tokenizer) == len(load_tokenizer(model))


def test_what_holds_no_single_model(place: Path) -> None:
    with pytest.raises(ValueError, match=r"holds 3 models: name one of .*b/model, .*a/model, .*reward/model"):
        Network(str(place / "pipeline"))
    with pytest.raises(ValueError, match=r"so it has no model yet. Resume .* --ckpt_path last"):
        load_tokenizer(str(place / "failed"))
    with pytest.raises(ValueError, match=r"last\.ckpt' is a checkpoint, .* name the folder of its run, '.*failed'"):
        Network(str(place / "failed" / "checkpoints" / "last.ckpt"))
    assert Network("owner/name").name == "owner/name"


def test_a_fit_starts_from_a_run(place: Path, tmp_path: Path) -> None:
    content = config("sft", str(place / "run"), place, tmp_path / "out", max_steps=1, enable_progress_bar=False)
    (tmp_path / "sft.yaml").write_text(yaml.safe_dump(content))
    main(["fit", "-c", str(tmp_path / "sft.yaml"), "--model.network", os.path.relpath(place / "run")])
    parents = json.loads((tmp_path / "out" / "manifest.json").read_text())["parents"]
    assert str(place / "run" / "model") in parents
    content["model"]["init_args"]["network"] = str(place / "failed")
    (tmp_path / "sft.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError, match="so it has no model yet") as caught:
        main(["fit", "-c", str(tmp_path / "sft.yaml")])
    assert "\n" not in str(caught.value)
