"""A configuration names code: what each of its slots accepts, and that nothing else is called."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from jsonargparse import Namespace
from support.configs import config
from support.parsers import only
from support.runs import write_rows
from support.tiny import tiny_folder

from lit_align.cli.commands import _step
from lit_align.cli.entry import main
from lit_align.config import named_code
from lit_align.config.errors import ConfigError
from lit_align.functional.sft import SFT_LOSSES


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    place = tmp_path_factory.mktemp("parts")
    write_rows(place)
    return tiny_folder(place / "policy"), place


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    return tmp_path / "called"


def spec(target: str, mark: Path) -> dict[str, Any]:
    """A class path that leaves the mark when it is called with its arguments."""
    arguments: dict[str, Any] = {
        "os.system": {"command": f"touch {mark}"},
        "lit_align.cli.lightning_cli.os.system": {"command": f"touch {mark}"},
        "subprocess.Popen": {"args": ["touch", str(mark)]},
        "subprocess.run": {"args": ["touch", str(mark)]},
        "builtins.exec": {"source": f"open({str(mark)!r}, 'w')"},
        "builtins.open": {"file": str(mark), "mode": "w"},
        "functools.partial": {"func": "os.system"},
        "lit_align.utils.disk.write_whole": {"path": str(mark), "text": ""},
    }
    return {"class_path": target, "init_args": arguments.get(target, {"path": str(mark)})}


TARGETS = [
    "os.system", "lit_align.cli.lightning_cli.os.system",
    "subprocess.Popen", "subprocess.run", "builtins.exec", "builtins.open",
    "functools.partial", "lit_align.utils.disk.write_whole", "support.evil.touch", "support.evil.promises",
    "support.evil.promises_callback", "support.evil.promises_function", "support.evil.Other",
    "support.evil.OtherCallable.build",
]  # fmt: skip
SLOTS = [
    "model", "model.optimizer", "model.schedule", "model.lr_scheduler", "model.reward", "model.engine",
    "model.reward.function", "data", "data.train.rows", "trainer.callbacks", "trainer.logger", "trainer.plugins",
    "trainer.strategy", "trainer.profiler", "trainer.callbacks.on_fit_start",
]  # fmt: skip


def filled(content: dict[str, Any], slot: str, value: Any) -> dict[str, Any]:
    """The configuration with a value in one of its slots."""
    model, data = content["model"], content["data"]
    if slot in ("model", "data"):
        return {**content, slot: value}
    owner, _, key = slot.partition(".")
    if slot == "model.reward.function":
        model["init_args"]["reward"] = {"class_path": "lit_align.FunctionReward", "init_args": {"function": value}}
    elif slot == "data.train.rows":
        data["init_args"]["train"] = [{"rows": value}]
    elif slot == "trainer.callbacks.on_fit_start":
        name = "lightning.pytorch.callbacks.LambdaCallback"
        content["trainer"]["callbacks"] = [{"class_path": name, "init_args": {"on_fit_start": value}}]
    elif owner == "trainer":
        content["trainer"][key] = [value] if key in ("callbacks", "plugins") else value
    else:
        model["init_args"][key] = value
    return content


def fit(content: dict[str, Any], place: Path, *more: str) -> None:
    (place / "run.yaml").write_text(yaml.safe_dump(content))
    main(["fit", "-c", str(place / "run.yaml"), *more])


@pytest.mark.parametrize("slot", SLOTS)
def test_a_slot_accepts_what_its_type_says(
    slot: str, parts: tuple[str, Path], tmp_path: Path, mark: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    only("fit", monkeypatch)
    for target in TARGETS:
        content = config("ppo", *parts, tmp_path / "run", max_steps=1)
        with pytest.raises(ConfigError) as told:
            fit(filled(content, slot, spec(target, mark)), tmp_path)
        assert not mark.exists(), target
        assert "\n" not in str(told.value)
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("target", ["os.system", "support.evil.touch", "lit_align.utils.disk.write_whole"])
def test_a_function_alone_is_no_optimizer(
    target: str, parts: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    only("fit", monkeypatch)
    content = config("sft", *parts, tmp_path / "run", max_steps=1)
    with pytest.raises(ConfigError, match="optimizer"):
        fit(filled(content, "model.optimizer", target), tmp_path)


@pytest.mark.parametrize("slot", ["model.reward.function", "trainer.callbacks.on_fit_start"])
@pytest.mark.parametrize(
    "target",
    [
        "sympy.sympify",
        "pandas.eval",
        "torch.hub.load",
        "torch.load",
        "numpy.load",
        "typing.get_type_hints",
        "zipapp.main",
    ],
)
def test_a_function_of_a_library_is_not_called(
    target: str, slot: str, parts: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With `function: sympy.sympify`, prompts of the data would be run as code."""
    only("fit", monkeypatch)
    content = config("ppo", *parts, tmp_path / "run", max_steps=4)
    with pytest.raises(ConfigError, match="may not name"):
        fit(filled(content, slot, target), tmp_path)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("target", ["torch.nn.functional.gelu", "math.sqrt", "support.evil.touch"])
def test_arithmetic_and_functions_of_the_user_can_be_named(target: str) -> None:
    named_code.check(Namespace(function=named_code._object(target)))


@pytest.mark.parametrize("key", ["inner", "others"])
def test_what_has_no_type_builds_nothing(
    key: str, parts: tuple[str, Path], tmp_path: Path, mark: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    only("fit", monkeypatch)
    content = config("ppo", *parts, tmp_path / "run", max_steps=1)
    for inner in (spec("os.system", mark), spec("support.evil.Other", mark), [spec("support.evil.Other", mark)]):
        own = {"class_path": "support.evil.Open", "init_args": {"inner": 1, key: inner}}
        with pytest.raises(ConfigError, match="function"):
            fit(filled(content, "model.reward.function", own), tmp_path)
        assert not mark.exists()


def test_classes_of_a_user_are_built(parts: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reward is code by intent: a function by its path, or a class whose objects can be called."""
    only("fit", monkeypatch)
    for function in ("support.runs.echo", {"class_path": "support.evil.Open", "init_args": {"inner": 1}}):
        content = config("ppo", *parts, tmp_path / "run", max_steps=4)
        fit(filled(content, "model.reward.function", function), tmp_path)
    assert (tmp_path / "run-2" / "model").exists()


@pytest.mark.parametrize("target", ["os.system", "support.evil.Other", "support.evil.touch", "subprocess.Popen"])
def test_a_step_of_a_pipeline_accepts_what_has_run(target: str, tmp_path: Path, mark: Path) -> None:
    file = tmp_path / "stage.yaml"
    inner = {"class_path": "support.evil.Method", "init_args": {"inner": spec(target, mark)}}
    for content in (spec(target, mark), inner):
        file.write_text(yaml.safe_dump(content))
        with pytest.raises(ConfigError, match=r"stage\.yaml"):
            _step(file, tmp_path)
        assert not mark.exists()


@pytest.fixture(scope="module")
def trained(parts: tuple[str, Path]) -> tuple[dict[str, Any], Path]:
    """A run, and its checkpoint."""
    content = config("sft", *parts, parts[1] / "run", max_steps=1)
    fit(content, parts[1])
    return content, parts[1] / "run" / "checkpoints" / "last.ckpt"


def with_parameters(checkpoint: Path, to: Path, hyper: dict[str, Any]) -> str:
    held = torch.load(checkpoint, weights_only=True)
    torch.save({**held, "hyper_parameters": hyper}, to)
    return str(to)


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict", "doctor"])
def test_nothing_of_a_checkpoint_reaches_the_configuration(
    command: str,
    trained: tuple[dict[str, Any], Path],
    parts: tuple[str, Path],
    tmp_path: Path,
    mark: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    only("fit" if command == "doctor" else command, monkeypatch)
    content, checkpoint = copy.deepcopy(trained)
    if command == "predict":
        content = {**content, "data": config("ppo", *parts, tmp_path)["data"]}
    if command == "doctor":
        content["data"]["init_args"].pop("val", None)  # it would look at the prompts that both have
    steps = 4 if command == "doctor" else 2  # doctor wants the warm-up of two steps to end
    content = {**content, "out": str(tmp_path / "run"), "trainer": {"accelerator": "cpu", "max_steps": steps}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(content))
    network = {"name": parts[0]}
    own = {"network": network, "optimizer": spec("os.system", mark)}
    for hyper in (
        {"class_path": "lit_align.SFTModule", "init_args": own},
        {"class_path": "lit_align.DPOModule", "init_args": {"network": network, "beta": 0.5}},
        {"_class_path": "lit_align.RewardModule", "network": network},
        {"_instantiator": "lightning.pytorch.cli.instantiate_module", "loss": "dft", "_class_path": "SFTModule"},
    ):
        file = with_parameters(checkpoint, tmp_path / "evil.ckpt", hyper)
        cli = main([command, "-c", str(tmp_path / "run.yaml"), "--ckpt_path", file])
        assert not mark.exists()
        assert type(cli.model).__name__ == "SFTModule"
        assert cli.model.loss_function is SFT_LOSSES["nll"]
        assert cli.model.optimizer([torch.zeros(1)]).defaults["lr"] == 0.01


def test_a_configuration_that_differs_from_the_checkpoint_is_an_error(
    trained: tuple[dict[str, Any], Path], parts: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where hyper-parameters of the checkpoint would have made them alike."""
    only("fit", monkeypatch)
    content, checkpoint = copy.deepcopy(trained)
    asked = {**content["model"]["init_args"], "neftune_alpha": 5.0}
    hyper = {"class_path": "lit_align.SFTModule", "init_args": {"network": {"name": parts[0]}, "neftune_alpha": None}}
    file = with_parameters(checkpoint, tmp_path / "kept.ckpt", hyper)
    content = {**content, "model": {"class_path": "lit_align.SFTModule", "init_args": asked}}
    with pytest.raises(ValueError, match=r"model\.init_args\.neftune_alpha \(None, now 5\.0\)"):
        fit({**content, "out": str(tmp_path / "run")}, tmp_path, "--ckpt_path", file)
