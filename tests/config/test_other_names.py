"""Keys by their names in TRL and in earlier versions: the error says what they are called here."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest
import yaml
from support.parsers import only

import lit_align
from lit_align.callbacks import RunCheckpoint
from lit_align.cli.entry import main

PAGE = Path(__file__).parents[2] / "docs" / "coming-from-trl.md"


@pytest.fixture(autouse=True)
def fit_only(monkeypatch: pytest.MonkeyPatch) -> None:
    only("fit", monkeypatch)


def refused(folder: Path, *args: str, module: str = "SFTModule", top: dict | None = None, **init: object) -> str:
    """The line that a fit ends with."""
    data = {"SFTModule": "Instruction", "DPOModule": "Preference", "PPOModule": "Prompt"}[module]
    model = {"network": "m", **({"reward": "r/m"} if module == "PPOModule" else {}), **init}
    content = {
        "model": {"class_path": f"lit_align.{module}", "init_args": model},
        "data": {"class_path": f"lit_align.{data}DataModule", "init_args": {"tokenizer": "m", "train": "a.jsonl"}},
        **(top or {}),
    }
    (folder / "c.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError) as caught:
        main(["fit", "-c", str(folder / "c.yaml"), *args])
    assert "\n" not in str(caught.value)
    return str(caught.value)


USUAL = {
    "learning_rate": "model.optimizer",
    "num_train_epochs": "trainer.max_epochs",
    "per_device_train_batch_size": "data.batch_size",
    "gradient_accumulation_steps": "trainer.accumulate_grad_batches",
    "num_generations": "model.sampling.samples",
    "max_completion_length": "model.sampling.max_new_tokens",
    "model_name_or_path": "model.network.name",
    "dataset_name": "data.train",
    "lora_r": "model.network.lora.r",
}


@pytest.mark.parametrize(("theirs", "ours"), USUAL.items())
def test_keys_of_trl_wherever_they_are_written(tmp_path: Path, theirs: str, ours: str) -> None:
    said = f"TRL's '{theirs}' is {ours}"
    assert said in refused(tmp_path, f"--{theirs}=1")
    assert said in refused(tmp_path, top={theirs: 1})
    assert said in refused(tmp_path, **{theirs: 1})
    assert said in refused(tmp_path, f"--model.{theirs}=1")


def test_a_key_that_means_something_else_in_another_method(tmp_path: Path) -> None:
    assert "TRL's 'beta' is model.beta or model.kl_coef here (beta in DPO, kl_coef in PPO" in refused(
        tmp_path, module="PPOModule", beta=0.1
    )
    assert "TRL's 'load_in_4bit' has no key here" in refused(tmp_path, "--load_in_4bit=true")


ROOTS = {
    "data": [lit_align.InstructionDataModule, lit_align.PreferenceDataModule, lit_align.PromptDataModule],
    "model": [lit_align.SFTModule, lit_align.RewardModule, lit_align.DPOModule, lit_align.PPOModule],
    "checkpoint": [RunCheckpoint],
}
TOP = {"out", "seed_everything", "export", "ckpt_path"}


def exists(key: str) -> bool:
    """Whether one of our classes takes a dotted key."""
    keys = importlib.import_module("lit_align.config.keys")
    root, *path = key.split(".")
    if not path:
        return root in TOP
    roots = ROOTS.get(root) or [importlib.import_module("lightning").Trainer]
    holders = [keys.inner_class(cls, path[:-1]) for cls in roots]
    return any(holder is not None and path[-1] in keys.keys(holder) for holder in holders)


def test_every_key_of_ours_exists() -> None:
    trl = importlib.import_module("lit_align.config.other_names").TRL
    assert [key for ours, _ in trl.values() for key in ours if not exists(key)] == []
    assert not exists("model.network.lora.rank")
    assert not exists("nothing")


def test_the_page_has_every_key() -> None:
    trl = importlib.import_module("lit_align.config.other_names").TRL
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*?) \|", PAGE.read_text(), re.MULTILINE))
    assert list(rows) == list(trl)
    for name, (ours, _) in trl.items():
        assert re.findall(r"`([\w.]+)`", rows[name]) == list(ours), name


def test_the_page_of_axolotl_and_llama_factory_names_keys_that_exist() -> None:
    page = (PAGE.parent / "coming-from-others.md").read_text()
    rows = [line.split("|") for line in page.splitlines() if line.startswith("| `")]
    keys = [key for row in rows for key in re.findall(r"`([\w.]+)`", row[2])]
    assert len(keys) > 80
    assert [key for key in keys if not exists(key)] == []


def test_a_key_of_an_earlier_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = importlib.import_module("lit_align.config.other_names")
    monkeypatch.setitem(names.RENAMED, "model.network.checkpointing", "model.network.activation_checkpointing")
    monkeypatch.setitem(names.RENAMED, "model.rollouts", "model.sampling")
    monkeypatch.setitem(names.RENAMED, "folder", "out")
    network = {"name": "m", "checkpointing": True}
    assert refused(tmp_path, network=network) == (
        "unknown key 'model.network.checkpointing': 'model.network.checkpointing' is now "
        "model.network.activation_checkpointing"
    )
    assert "'model.rollouts.samples' is now model.sampling.samples" in refused(tmp_path, "--model.rollouts.samples=2")
    assert "'folder' is now out" in refused(tmp_path, top={"folder": "x"})
    assert "'folder' is now out" in refused(tmp_path, "--folder=x")


NEAREST = {
    "--model.network.lroa.r=3": "'lora'",
    "--model.network.lora.rr=3": "'r'",
    "--model.sampling.sample=2": "'samples'",
    "--trainer.max_step=3": "'max_steps'",
    "--modle.network=3": "'model'",
    "--checkpoint.monitr=x": "'monitor'",
    "--expotr=last": "'export'",
}


@pytest.mark.parametrize(("word", "near"), NEAREST.items())
def test_the_nearest_name_at_every_depth(tmp_path: Path, word: str, near: str) -> None:
    assert f"did you mean {near}?" in refused(tmp_path, word)
