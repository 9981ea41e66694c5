"""Short forms: a text where a source, a network or a reward is expected, in YAML, on the command line and in Python."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.parsers import only
from support.runs import echo, write_rows
from support.tiny import tiny_folder

from lit_align import (
    DPOModule,
    EnsembleReward,
    FunctionReward,
    InstructionDataModule,
    ModelReward,
    Network,
    PPOModule,
    PreferenceDataModule,
    RewardModule,
    SFTModule,
    Source,
)
from lit_align.cli.entry import main


@pytest.fixture
def parsed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> Callable[..., dict[str, Any]]:
    """The whole configuration of a file of this content and of arguments."""
    only("fit", monkeypatch)
    monkeypatch.chdir(tmp_path)

    def parsed(model: Any, data: Any, *args: str) -> dict[str, Any]:
        (tmp_path / "c.yaml").write_text(yaml.safe_dump({"model": model, "data": data}))
        with pytest.raises(SystemExit):
            main(["fit", "-c", str(tmp_path / "c.yaml"), *args, "--print_config"])
        return yaml.safe_load(capsys.readouterr().out)

    return parsed


def sft(**init: Any) -> dict[str, Any]:
    return {"class_path": "lit_align.SFTModule", "init_args": {"network": "models/qwen3", **init}}


def rows(**init: Any) -> dict[str, Any]:
    return {"class_path": "lit_align.InstructionDataModule", "init_args": {"tokenizer": "m", **init}}


def sources(config: dict[str, Any], part: str = "train") -> list[dict[str, Any]]:
    held = config["data"]["init_args"][part]
    return [{key: source[key] for key in ("path", "hub", "limit") if source[key]} for source in held]


MINE = [{"path": "data/alpaca.jsonl"}]


@pytest.mark.parametrize(
    "train", ["data/alpaca.jsonl", ["data/alpaca.jsonl"], {"path": "data/alpaca.jsonl"}, MINE], ids=str
)
def test_sources(parsed: Callable, train: Any) -> None:
    config = parsed(sft(), rows(train=train, val=["own/val", {"path": "b.json"}]))
    assert sources(config) == MINE
    assert sources(config, "val") == [{"hub": "own/val"}, {"path": "b.json"}]


@pytest.mark.parametrize("value", ["data/alpaca.jsonl", "[data/alpaca.jsonl]", "{path: data/alpaca.jsonl}"])
def test_sources_on_the_command_line(parsed: Callable, value: str) -> None:
    config = parsed(sft(), rows(train=[{"hub": "a/b", "limit": 3}]), f"--data.train={value}")
    assert sources(config) == MINE
    assert sources(parsed(sft(), rows(train="a/b"), "--data.train.limit=3")) == [{"hub": "a/b", "limit": 3}]


def test_a_network_by_its_name_takes_further_keys(parsed: Callable) -> None:
    network = parsed(sft(), rows(train="a.json"), "--model.network.lora.r=3")["model"]["init_args"]["network"]
    assert (network["name"], network["lora"]["r"], network["dtype"]) == ("models/qwen3", 3, "float32")
    lora = {"name": "m", "lora": {"r": 3}}
    network = parsed(sft(network=lora), rows(train="a.json"), "--model.network=other")["model"]["init_args"]["network"]
    assert (network["name"], network["lora"]["r"]) == ("other", 3)


def test_an_adapter_by_its_rank(parsed: Callable) -> None:
    def lora(network: Any, *args: str) -> Any:
        held = parsed(sft(network=network), rows(train="a.json"), *args)["model"]["init_args"]["network"]["lora"]
        return held and held["r"]

    assert lora({"name": "m", "lora": True}) == 16
    assert lora({"name": "m", "lora": 8}) == 8
    assert lora("m", "--model.network.lora=4") == 4
    assert lora("m", "--model.network.lora=true", "--model.network.lora.alpha=8") == 16
    assert lora({"name": "m", "lora": {"r": 3}}) == 3
    assert lora({"name": "m", "lora": None}) is None


def test_networks_and_rewards_of_other_modules(parsed: Callable) -> None:
    dpo = {"class_path": "lit_align.DPOModule", "init_args": {"network": "m", "reference": "models/sft"}}
    data = {"class_path": "lit_align.PreferenceDataModule", "init_args": {"tokenizer": "m", "train": ["a.json"]}}
    assert parsed(dpo, data)["model"]["init_args"]["reference"]["name"] == "models/sft"
    ensemble = {"class_path": "lit_align.EnsembleReward", "init_args": {"rewards": ["rm/a", "support.runs.echo"]}}
    init = {"network": "m", "value": "rm/value", "reward": "rm/model", "monitors": {"b": "rm/b", "e": ensemble}}
    data = {"class_path": "lit_align.PromptDataModule", "init_args": {"tokenizer": "m", "train": ["a.json"]}}
    model = parsed({"class_path": "lit_align.PPOModule", "init_args": init}, data)["model"]["init_args"]
    assert model["value"]["name"] == "rm/value"
    for reward, name in ((model["reward"], "rm/model"), (model["monitors"]["b"], "rm/b")):
        assert reward["class_path"].endswith("ModelReward")
        assert reward["init_args"]["network"]["name"] == name
    first, second = model["monitors"]["e"]["init_args"]["rewards"]
    assert first["init_args"]["network"]["name"] == "rm/a"
    assert second["init_args"]["function"] == "support.runs.echo"


def test_a_class_is_still_named_by_a_text(parsed: Callable) -> None:
    ppo = {"class_path": "lit_align.PPOModule", "init_args": {"network": "m", "reward": "NumericAnswer"}}
    data = {"class_path": "lit_align.PromptDataModule", "init_args": {"tokenizer": "m", "train": ["a.json"]}}
    assert parsed(ppo, data)["model"]["init_args"]["reward"]["class_path"].endswith("NumericAnswer")


def test_what_is_a_path_and_what_is_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lit_align.data.source import keys_of

    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "plain").touch()
    paths = ("a.jsonl", "a/b.csv.gz", "./a", "/a", "~/a", "$DATA/a", "a/*", "zip://a::b", "data/a", "plain", "data")
    assert [keys_of(text) for text in paths] == [{"path": text} for text in paths]
    assert keys_of("trl-lib/ultrafeedback_binarized") == {"hub": "trl-lib/ultrafeedback_binarized"}
    for text in ("alpaca", "a b", "a/b/c", ""):
        with pytest.raises(ValueError, match=r"neither a file nor a data set of the hub \(owner/name\): write {path"):
            keys_of(text)


def test_a_text_that_is_neither_is_one_line(tmp_path: Path, parsed: Callable) -> None:
    with pytest.raises(ValueError, match="'alpaca' is neither a file nor") as caught:
        parsed(sft(), rows(train="alpaca"))
    assert "\n" not in str(caught.value)


def test_python_callers(tmp_path: Path) -> None:
    write_rows(tmp_path)
    folder = tiny_folder(tmp_path / "model")
    for name in (folder, Path(folder), Network(folder)):
        assert DPOModule(name, reference=name).network == Network(folder)
        assert SFTModule(name).network.name == RewardModule(name).network.name == folder
    assert Network(Path(folder)).name == folder
    file = tmp_path / "rankings.json"
    for train in (str(file), file, [str(file)], [file], [Source(str(file))], Source(file)):
        data = PreferenceDataModule(Path(folder), train, cache_dir="none")
        assert data.sources["train"] == [Source(str(file))]
        assert data.tokenizer_name == folder
    data.setup("fit")
    assert len(data.training_items(3)) == 3
    with pytest.raises(TypeError, match="expected a Source, or the name of a file or data set, got 3"):
        InstructionDataModule(folder, [3])
    with pytest.raises(TypeError, match="expected a Network, or the name or folder of a model, got 3"):
        SFTModule(3)


def test_rewards_in_python(tmp_path: Path) -> None:
    module = PPOModule("m", Path("rm"), value="v", monitors={"e": echo})
    assert isinstance(module.reward, ModelReward)
    assert (module.reward.network.name, module.value_network.name) == ("rm", "v")
    assert isinstance(module.monitors["e"], FunctionReward)
    both = EnsembleReward(["a", Path("b")])
    assert [reward.network.name for reward in both.rewards] == ["a", "b"]
    with pytest.raises(TypeError, match="expected a Reward, a reward model's folder or a function, got 3"):
        PPOModule("m", 3)


def test_a_step_of_a_pipeline(tmp_path: Path) -> None:
    rows = tmp_path / "texts.jsonl"
    rows.write_text("\n".join(json.dumps({"text": f"a word {n}"}) for n in range(5)))
    step = {
        "class_path": "lit_align.pipeline.scratch_model.ScratchModel",
        "init_args": {"texts": [str(rows)], "layers": 1},
    }
    (tmp_path / "step.yaml").write_text(yaml.safe_dump(step))
    pipeline = {"root": str(tmp_path / "out"), "stages": {"one": {"call": "step.yaml"}}}
    (tmp_path / "pipeline.yaml").write_text(yaml.safe_dump(pipeline))
    main(["pipeline", str(tmp_path / "pipeline.yaml")])
    assert (tmp_path / "out" / "one" / "model" / "config.json").exists()
