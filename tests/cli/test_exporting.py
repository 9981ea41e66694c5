"""`lit-align export`: any checkpoint of the four methods becomes a folder that plain transformers loads."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from support.configs import config
from support.runs import write_rows
from support.tiny import tiny_folder
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from lit_align.cli.entry import main
from lit_align.models.seal import broken_seal

IDS = torch.tensor([[1, 40, 50, 60, 70, 80]])
Run = Callable[..., Path]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The folder of a finished run; the same run is made once."""
    place = tmp_path_factory.mktemp("runs")
    write_rows(place)
    tiny_folder(place / "model")
    made: dict[str, Path] = {}

    def fitted(method: str, *more: str) -> Path:
        key = f"{method} {more}"
        if key not in made:
            out = place / f"run{len(made)}"
            content = config(method, str(place / "model"), place, out, max_steps=4, val_check_interval=2)
            content["trainer"]["check_val_every_n_epoch"] = None
            if method == "ppo":
                content["trainer"] |= {"val_check_interval": 1}
            content["data"]["init_args"]["cache_dir"] = "none"
            (place / "run.yaml").write_text(yaml.safe_dump(content))
            main(["fit", "-c", str(place / "run.yaml"), *more])
            made[key] = out
        return made[key]

    return fitted


def logits(folder: Path, **options: Any) -> torch.Tensor:
    reward = "SequenceClassification" in json.loads((folder / "config.json").read_text())["architectures"][0]
    auto = AutoModelForSequenceClassification if reward else AutoModelForCausalLM
    with torch.no_grad():
        return auto.from_pretrained(folder, **{"dtype": torch.float32, **options}).eval()(IDS).logits


BEST = ("--checkpoint.monitor=val/loss", "--checkpoint.mode=max")
LORA = ("--model.network.lora.r=4",)


@pytest.mark.parametrize(
    ("method", "more"),
    [("sft", ()), ("sft", LORA), ("reward", ()), ("reward", LORA), ("dpo", ()), ("dpo", LORA), ("ppo", ())],
    ids=lambda value: value if isinstance(value, str) else "lora" if value else "full",
)
def test_it_is_the_model_that_the_run_left(run: Run, tmp_path: Path, method: str, more: tuple[str, ...]) -> None:
    folder = run(method, *more)
    said = main(["export", str(folder), str(tmp_path / "out")])
    assert f"the weights of the last optimizer step, 4: written to {tmp_path / 'out'}" in said
    assert torch.equal(logits(tmp_path / "out"), logits(folder / "model"))
    theirs, ours = (load_file(place / "model.safetensors") for place in (folder / "model", tmp_path / "out"))
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in ours)
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (folder / "model" / file).read_text() == (tmp_path / "out" / file).read_text()
    assert broken_seal(tmp_path / "out") is None
    card = [
        (place / "README.md").read_text().partition("\n# ")[2].partition("\n")[2]
        for place in (folder / "model", tmp_path / "out")
    ]
    assert card[0] == card[1]


def test_from_a_file_and_twice(run: Run, tmp_path: Path) -> None:
    folder, out = run("sft"), tmp_path / "out"
    last = folder / "checkpoints" / "last.ckpt"
    main(["export", str(last), str(out)])
    (out / "stale").touch()
    main(["export", str(last), str(out), "--dtype", "bfloat16"])
    assert not (out / "stale").exists()
    assert {weight.dtype for weight in load_file(out / "model.safetensors").values()} == {torch.bfloat16}
    assert torch.equal(logits(folder / "model", dtype=torch.bfloat16), logits(out, dtype=torch.bfloat16))


def test_the_last_or_the_best(run: Run, tmp_path: Path) -> None:
    folder = run("sft", *BEST)
    assert json.loads((folder / "model" / "lit_align.json").read_text())["step"] == 2
    main(["export", str(folder), str(tmp_path / "best")])
    main(["export", str(folder), str(tmp_path / "last"), "--which=last"])
    assert torch.equal(logits(tmp_path / "best"), logits(folder / "model"))
    assert not torch.equal(logits(tmp_path / "last"), logits(folder / "model"))
    told = {name: json.loads((tmp_path / name / "lit_align.json").read_text()) for name in ("best", "last")}
    assert (told["best"]["which"], told["best"]["step"], told["best"]["steps"]) == ("best", 2, 4)
    assert told["best"]["monitor"] == "val/loss"
    assert (told["last"]["which"], told["last"]["step"]) == ("last", 4)
    assert "optimizer step 2 of 4, the best by val/loss" in (tmp_path / "best" / "README.md").read_text()


def test_an_adapter_is_merged_unless_it_is_kept(run: Run, tmp_path: Path) -> None:
    folder = run("sft", *LORA)
    main(["export", str(folder), str(tmp_path / "adapter"), "--adapter"])
    told = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    base = AutoModelForCausalLM.from_pretrained(told["base_model_name_or_path"], dtype=torch.float32)
    with torch.no_grad():
        kept = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()(IDS).logits
    assert (kept - logits(folder / "model")).abs().max() < 1e-5
    with pytest.raises(ValueError, match="--adapter: the run trained the whole model"):
        main(["export", str(run("sft")), str(tmp_path / "none"), "--adapter"])


def test_the_average_of_the_weights(run: Run, tmp_path: Path) -> None:
    ema = '--trainer.callbacks=[{"class_path": "lit_align.callbacks.WeightEMA", "init_args": {"decay": 0.5}}]'
    folder = run("sft", ema)
    main(["export", str(folder), str(tmp_path / "out")])
    assert torch.equal(logits(tmp_path / "out"), logits(folder / "model"))
    state = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert not torch.equal(
        load_file(tmp_path / "out" / "model.safetensors")["lm_head.weight"], state["policy.hf.lm_head.weight"]
    )


def test_roles_of_ppo(run: Run, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--role value: the value model shares the policy's backbone"):
        main(["export", str(run("ppo")), str(tmp_path / "value"), "--role=value"])
    model = yaml.safe_load((run("ppo") / "config.yaml").read_text())["model"]["init_args"]["network"]["name"]
    folder = run("ppo", f"--model.value.name={model}")
    main(["export", str(folder), str(tmp_path / "value"), "--role=value"])
    state = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    held = load_file(tmp_path / "value" / "model.safetensors")
    assert held.keys() == {name.removeprefix("value.hf.") for name in state if name.startswith("value.hf.")}
    assert all(torch.equal(weight, state[f"value.hf.{name}"]) for name, weight in held.items())
    assert logits(tmp_path / "value").shape == (1, 1)
    for method, role, says in (("sft", "value", "has policy"), ("reward", "policy", "has reward")):
        with pytest.raises(ValueError, match=f"--role {role}: a run of .* {says}"):
            main(["export", str(run(method)), str(tmp_path / "none"), f"--role={role}"])


# Kills: a folder of the user's that is replaced.
def test_nothing_of_the_users_is_replaced(run: Run, tmp_path: Path) -> None:
    folder, mine = run("sft"), tmp_path / "mine"
    mine.mkdir()
    (mine / "net.py").write_text("mine")
    with pytest.raises(ValueError, match=r"mine holds files that no export of lit-align wrote"):
        main(["export", str(folder), str(mine)])
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(mine)
    for name in ("file", "link"):
        with pytest.raises(ValueError, match=rf"{name} is a file or a link"):
            main(["export", str(folder), str(tmp_path / name)])
    assert [path.name for path in mine.iterdir()] == ["net.py"]
    (tmp_path / "empty").mkdir()
    main(["export", str(folder), str(tmp_path / "empty")])
    assert (tmp_path / "empty" / "model.safetensors").exists()


def test_errors_of_one_line(run: Run, tmp_path: Path) -> None:
    folder, out = run("sft"), str(tmp_path / "out")
    alone = tmp_path / "alone.ckpt"
    shutil.copy(folder / "checkpoints" / "last.ckpt", alone)
    cases = [
        ([str(tmp_path / "nowhere"), out], "nowhere: no such file or folder"),
        ([str(folder / "model"), out], "it is a model's folder already"),
        ([str(folder), out, "--which=best"], "has no best.ckpt; best.ckpt is there when checkpoint.monitor is set"),
        ([str(alone), out], "lies in no run's folder with a config.yaml: name it with --config FILE"),
        ([str(alone), out, "--which=last"], "SOURCE is a file"),
        ([str(folder), out, "--dtype=int8"], "invalid choice"),
        ([str(folder)], "arguments are required: out"),
    ]
    for args, says in cases:
        with pytest.raises(ValueError, match=says) as caught:
            main(["export", *args])
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
    main(["export", str(alone), out, "--config", str(folder / "config.yaml")])
    assert torch.equal(logits(tmp_path / "out"), logits(folder / "model"))
    alone.write_bytes(alone.read_bytes()[:-100])
    with pytest.raises(ValueError, match="is damaged and cannot be read"):
        main(["export", str(alone), out, "--config", str(folder / "config.yaml")])


def test_the_tokenizer_comes_along(run: Run, tmp_path: Path) -> None:
    main(["export", str(run("reward")), str(tmp_path / "out")])
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template


# Kills: a tokenizer without the tokens that the model has rows for.
@pytest.mark.parametrize("finished", [True, False], ids=["finished", "interrupted"])
def test_new_tokens(run: Run, tmp_path: Path, finished: bool) -> None:
    folder = shutil.copytree(run("sft", "--model.network.new_tokens=[<tool>]"), tmp_path / "run", symlinks=True)
    ours = AutoTokenizer.from_pretrained(folder / "model").get_vocab()
    if not finished:
        shutil.rmtree(folder / "model")
    main(["export", str(folder), str(tmp_path / "out")])
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs.get_vocab() == ours
    assert theirs.chat_template
    assert "<tool>" in ours
