"""A resumed run compares what it is made of with what the checkpoint was made of."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from support.configs import config
from support.runs import write_rows
from support.tiny import tiny_folder

from lit_align.callbacks.resume import KINDS, allowed, config_changes, kind_of_role, manifest_changes
from lit_align.cli.entry import main
from lit_align.models import Lora, Network, export, load_scorer, load_tokenizer

Fit = Callable[..., None]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model, another one, and rows."""
    monkeypatch.setenv("LIT_ALIGN_CACHE", str(tmp_path / "cache"))
    write_rows(tmp_path)
    tiny_folder(tmp_path / "model")
    tiny_folder(tmp_path / "other", seed=1)
    return tmp_path


@pytest.fixture
def fit(place: Path) -> Fit:
    """Fit for two steps, or for four when resumed; the configuration may be changed first."""

    def run(method: str = "sft", *more: str, change: Callable[[dict[str, Any]], Any] = lambda _: None) -> None:
        content = config(
            method,
            str(place / "model"),
            place,
            place / "run",
            max_steps=(2 if not more else 4) * (2 if method == "ppo" else 1),
        )
        change(content)
        (place / "run.yaml").write_text(yaml.safe_dump(content))
        main(["fit", "-c", str(place / "run.yaml"), *more])

    return run


def step(place: Path) -> int:
    return torch.load(place / "run" / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]


def rewrite(file: Path) -> None:
    rows = json.loads(file.read_text())
    file.write_text(json.dumps(rows[::-1]))


def disturb(folder: Path, file: str = "model.safetensors") -> None:
    weights = load_file(folder / file)
    weights = {name: weight * 1.01 for name, weight in weights.items()}
    save_file(weights, folder / file, metadata={"format": "pt"})


def other_tokenizer(folder: Path) -> None:
    told = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(told | {"pad_token": "<unk>"}))


def with_reference(place: Path) -> Callable[[dict[str, Any]], Any]:
    return lambda content: content["model"]["init_args"].update(reference={"name": str(place / "other")})


def apart_val(place: Path) -> Callable[[dict[str, Any]], Any]:
    (place / "val.json").write_text((place / "demos.json").read_text())
    return lambda content: content["data"]["init_args"].update(val=[{"path": str(place / "val.json")}])


CHANGES: dict[str, tuple[str, Callable, Callable, str, str]] = {
    "data": ("sft", lambda _: None, lambda p: rewrite(p / "demos.json"), "data", "train data .*demos.json"),
    "validation": ("sft", apart_val, lambda p: rewrite(p / "val.json"), "validation", "val data .*val.json"),
    "policy": ("dpo", lambda _: None, lambda p: disturb(p / "model"), "model", "model .*model .its weights"),
    "reference": ("dpo", with_reference, lambda p: disturb(p / "other"), "reference", "reference model .*other"),
    "tokenizer": ("sft", lambda _: None, lambda p: other_tokenizer(p / "model"), "tokenizer", "tokenizer"),
}


# Kills: a run that goes on with other data or another model without a word.
@pytest.mark.parametrize("what", CHANGES)
def test_what_has_changed_is_refused_unless_it_is_allowed(
    place: Path, fit: Fit, capsys: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture, what: str
) -> None:
    method, start, change, kind, says = CHANGES[what]
    change_config = start(place) or (lambda _: None)
    fit(method, change=change_config)
    before = {path: path.read_bytes() for path in (place / "run").rglob("*") if path.is_file()}
    change(place)
    with pytest.raises(ValueError, match=rf"another {says}.*--resume.allow \[.*{kind}") as caught:
        fit(method, "--ckpt_path=last", change=change_config)
    assert "\n" not in str(caught.value)
    assert before == {path: path.read_bytes() for path in (place / "run").rglob("*") if path.is_file()}
    wrong = next(other for other in KINDS if other != kind)
    if what != "data":  # validation reads the same file there
        with pytest.raises(ValueError, match=rf"another {says}"):
            fit(method, "--ckpt_path=last", f"--resume.allow={wrong}", change=change_config)
    with caplog.at_level("INFO"):
        fit(method, "--ckpt_path=last", f"--resume.allow=[{kind},validation]", change=change_config)
    assert f"resumes with another {says.split()[0]}" in caplog.text
    assert step(place) == 4
    fit(method, "--ckpt_path=last", "--trainer.max_steps=5", change=change_config)  # accepted once is accepted
    assert step(place) == 5


def test_a_reward_models_folder(place: Path, fit: Fit) -> None:
    def scored(content: dict[str, Any]) -> None:
        network = {"name": str(place / "reward")}
        reward = {"class_path": "lit_align.ModelReward", "init_args": {"network": network}}
        content["model"]["init_args"]["reward"] = reward

    export(load_scorer(Network(str(place / "model"))), load_tokenizer(str(place / "model")), place / "reward")
    fit("ppo", change=scored)
    disturb(place / "reward")
    with pytest.raises(ValueError, match=r"another reward model .*reward .*--resume.allow \[reward\]"):
        fit("ppo", "--ckpt_path=last", change=scored)


def test_an_adapters_folder_is_a_parent_too(place: Path, fit: Fit) -> None:
    def scored(content: dict[str, Any]) -> None:
        content["model"]["init_args"]["network"]["lora"] = {"r": 2}
        network = {"name": str(place / "reward"), "shared": True}
        reward = {"class_path": "lit_align.ModelReward", "init_args": {"network": network}}
        content["model"]["init_args"]["reward"] = reward

    network = Network(str(place / "model"), lora=Lora(r=2, export="adapter"))
    export(load_scorer(network), None, place / "reward", adapter=True)
    fit("ppo", change=scored)
    parents = json.loads((place / "run" / "manifest.json").read_text())["parents"]
    assert set(parents) == {str(place / "model"), str(place / "reward")}


# Kills: a refusal of what does not change what is trained; a change that is not told.
@pytest.mark.parametrize(
    ("change", "kind"),
    [
        ("--trainer.val_check_interval=2", "validation"),
        ("--trainer.precision=bf16-mixed", "precision"),
        ("--data.val_batch_size=4", "validation"),
        ("--trainer.gradient_clip_val=0.7", "config"),
    ],
)
def test_keys_by_their_kind(place: Path, fit: Fit, caplog: pytest.LogCaptureFixture, change: str, kind: str) -> None:
    fit()
    with pytest.raises(ValueError, match=rf"accept the change: --resume.allow \[{kind}\]"):
        fit("sft", "--ckpt_path=last", change)
    with caplog.at_level("INFO"):
        fit("sft", "--ckpt_path=last", change, f"--resume.allow={kind}")
    assert f"resumes with another {change[2:].split('=')[0].replace('data.', 'data.init_args.')} (" in caplog.text
    assert step(place) == 4


# Kills: a change that is accepted, and undone by the optimizer's state in the checkpoint.
def test_the_learning_rate_is_the_checkpoints(place: Path, fit: Fit) -> None:
    fit()
    with pytest.raises(
        ValueError, match=r"optimizer.init_args.lr \(0.01, now 0.02\): the state of its optimizer holds"
    ):
        fit("sft", "--ckpt_path=last", "--model.optimizer.init_args.lr=0.02", "--resume.allow=config")


@pytest.mark.parametrize(
    "change", ["--trainer.logger=false", "--trainer.enable_progress_bar=false", "--trainer.limit_val_batches=1"]
)
def test_what_is_free(place: Path, fit: Fit, change: str) -> None:
    fit()
    fit("sft", "--ckpt_path=last", change)
    assert step(place) == 4


def test_versions_are_told(place: Path, fit: Fit, caplog: pytest.LogCaptureFixture) -> None:
    fit()
    last = place / "run" / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(last, weights_only=True)
    checkpoint["run_manifest"]["packages"]["torch"] = "1.0"
    torch.save(checkpoint, last)
    with caplog.at_level("INFO"):
        fit("sft", "--ckpt_path=last")
    assert "resumes with other versions, and the numbers may differ: torch 1.0, now 2" in caplog.text
    assert step(place) == 4


def test_a_model_of_another_size_is_one_line(place: Path, fit: Fit) -> None:
    fit()
    shutil.rmtree(place / "model")
    tiny_folder(place / "model", hidden_size=64)
    with pytest.raises(ValueError, match=r"the checkpoint holds .* of shape .* the starting model has changed"):
        fit("sft", "--ckpt_path=last")


@pytest.mark.parametrize("value", ["data,model", "[data, model]", ["data", "model"], " 'data' , model "])
def test_kinds_as_they_are_written(value: Any) -> None:
    assert allowed(value) == {"data", "model"}


def test_kinds_that_are_none() -> None:
    assert allowed(None) == allowed([]) == allowed("") == frozenset()
    with pytest.raises(ValueError, match=r"unknown kind 'dta'; kinds are data \(rows of training\), validation"):
        allowed("dta")


def test_the_role_of_a_folder() -> None:
    assert kind_of_role(["data.init_args.tokenizer"]) == ""
    assert kind_of_role(["data.init_args.tokenizer", "model.init_args.network.name"]) == "model"
    assert kind_of_role(["model.init_args.reference.name"]) == "reference"
    assert kind_of_role(["model.init_args.reward.init_args.rewards.0.init_args.network.name"]) == "reward"
    assert kind_of_role(["model.init_args.value.name"]) == "model"


def test_what_a_manifest_lacks_is_not_compared() -> None:
    now = {"packages": {"torch": "2"}, "data": [], "tokenizer": "a", "parents": {"m": "x"}, "roles": {"m": []}}
    assert list(manifest_changes({}, now)) == []
    assert config_changes({"resume": {"allow": None}}, {"resume": {"allow": ["data"]}}) == []
    assert config_changes({}, {"export": "best", "resume": {"allow": None}}) == []
