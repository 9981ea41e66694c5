"""Each check of the doctor on a patient that is well, and on one that has just that."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from support.configs import METHODS, config
from support.parsers import only
from support.runs import write_rows
from support.tiny import tiny_folder
from transformers import AutoTokenizer

from lit_align.__main__ import entry
from lit_align.cli import main
from lit_align.config_error import ConfigError
from lit_align.doctor import gradients

Examined = Callable[..., tuple[dict[str, str], str]]


@pytest.fixture
def parts(tmp_path: Path) -> tuple[str, Path]:
    write_rows(tmp_path)
    return tiny_folder(tmp_path / "model"), tmp_path


@pytest.fixture
def examined(
    parts: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Examined:
    """Level of each check, and what was printed."""
    monkeypatch.setenv("LIT_ALIGN_CACHE", str(tmp_path / "cache"))
    only("fit", monkeypatch)

    def run(method: str, wrong: int = 0, model: Any = None, data: Any = None) -> tuple[dict[str, str], str]:
        content = config(method, *parts, tmp_path / "run")
        content["model"]["init_args"] |= model or {}
        content["data"]["init_args"] |= {"val": None, "val_fraction": 0.3, **(data or {})}
        (tmp_path / "patient.yaml").write_text(yaml.safe_dump(content))
        verdict = pytest.raises(ConfigError, match=rf"^{wrong} of \d+ findings") if wrong else contextlib.nullcontext()
        with verdict:
            main(["doctor", str(tmp_path / "patient.yaml")])
        printed = capsys.readouterr().out
        levels: dict[str, str] = {}
        for line in printed.splitlines():
            level, check = line[:5].strip(), line[7:18].strip()
            levels[check] = max(levels.get(check, "ok"), level, key=["ok", "look", "wrong"].index)
        return levels, printed

    return run


@pytest.mark.parametrize("method", METHODS)
def test_a_run_that_is_well(method: str, examined: Examined, tmp_path: Path) -> None:
    levels, printed = examined(method)
    assert set(levels.values()) == {"ok"}, printed
    assert {"truncation", "validation", "beginning", "memory", "gradient"} <= levels.keys()
    assert ("reference" in levels) == (method in ("dpo", "ppo"))
    assert ("rollout" in levels) == (method == "ppo")
    assert ("stop token" in levels) == (method != "ppo")
    # It looks, and leaves nothing.
    assert not (tmp_path / "run").exists()


def test_rows_that_are_cut_or_skipped(examined: Examined, tmp_path: Path) -> None:
    assert examined("sft", data={"max_length": 12})[0]["truncation"] == "look"
    rows = json.loads((tmp_path / "demos.json").read_text())
    (tmp_path / "demos.json").write_text(json.dumps([*rows, {"instruction": "x", "output": 3}]))
    assert examined("sft", data={"on_bad_row": "skip"})[0]["rows"] == "look"
    (tmp_path / "demos.json").write_text(json.dumps([*rows[:3], *[{"instruction": "x", "output": 3}] * 4]))
    assert examined("sft", wrong=1, data={"on_bad_row": "skip"})[0]["rows"] == "wrong"


def test_validation_on_prompts_that_are_trained_on(examined: Examined, tmp_path: Path) -> None:
    levels, printed = examined("sft", wrong=1, data={"val": [{"path": str(tmp_path / "demos.json")}]})
    assert levels["validation"] == "wrong"
    assert "7 prompts of data.val are trained on" in printed
    assert examined("sft", data={"val_fraction": 0.0})[0]["validation"] == "look"


def test_answers_that_do_not_stop(examined: Examined, tmp_path: Path) -> None:
    cut = examined("sft", data={"max_length": 12, "truncate": "answer", "on_bad_row": "skip"}, wrong=2)[1]
    assert "answers end with a scored stop token" in cut
    rows = [{"prompt": "a", "completion": "b" * n} for n in (1, 40, 50)]
    (tmp_path / "long.json").write_text(json.dumps(rows))
    some = {
        "train": [{"path": str(tmp_path / "long.json")}],
        "max_length": 30,
        "truncate": "answer",
        "val_fraction": 0.0,
    }
    levels, printed = examined("sft", data=some)
    assert levels["stop token"] == "look"
    assert "1 of 3 answers" in printed


def test_two_beginnings_and_padding_that_stops(examined: Examined, parts: tuple[str, Path]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(parts[0])
    tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(parts[0])
    levels, printed = examined("sft", wrong=1)
    assert levels["beginning"] == "wrong", printed
    assert levels["padding"] == "look"


def test_a_reference_that_is_another_model(examined: Examined, tmp_path: Path) -> None:
    other = tiny_folder(tmp_path / "other", seed=1)
    assert examined("dpo", model={"reference": {"name": other}})[0]["reference"] == "look"
    assert "reference" not in examined("dpo", model={"loss": "simpo"})[0]


# Kills: no backward through the values; through the two prompts that are answered and not the longest one.
@pytest.mark.parametrize("value", ["head", "own", "shared"])
def test_ppo_on_the_longest_prompt_with_the_longest_answers(value: str, examined: Examined, tmp_path: Path) -> None:
    name, lora = str(tmp_path / "model"), {"r": 2}
    init: dict[str, Any] = {} if value == "head" else {"value": {"name": name}}
    if value == "shared":
        init = {"network": {"name": name, "lora": lora}, "value": {"name": name, "lora": lora, "shared": True}}
    levels, printed = examined("ppo", model=init)
    assert levels["gradient"] == levels["reference"] == "ok", printed
    assert re.search(r"the longest prompt, \d+ tokens, with 2 answers of 6 tokens", printed)
    other = tiny_folder(tmp_path / "other", seed=1)
    assert examined("ppo", model={"reference": {"name": other}})[0]["reference"] == "look"


def test_weights_that_are_not_numbers(examined: Examined, parts: tuple[str, Path]) -> None:
    file = next(Path(parts[0]).glob("*.safetensors"))
    weights = load_file(file)
    weights["model.norm.weight"][0] = torch.nan
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(ValueError, match="model: some weights are not finite"):
        examined("sft")


def test_gradients_that_are_not_numbers_or_missing() -> None:
    module = torch.nn.Linear(2, 1)
    module(torch.tensor([1.0, torch.inf])).sum().backward()
    assert [finding.level for finding in gradients("this", module)] == ["wrong"]
    module.zero_grad()
    (module.weight.sum() * 2).backward()
    (finding,) = gradients("this", module)
    assert finding.level == "look"
    assert "1 trained parameters have none after this, the first being bias" in finding.says


def test_more_than_there_is_room_for(examined: Examined, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sysconf", lambda name: 1)
    assert examined("sft", wrong=1)[0]["memory"] == "wrong"


def test_exit_status(parts: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIT_ALIGN_CACHE", str(tmp_path / "cache"))
    for fraction, status in ((0.3, 0), (None, 1)):
        content = config("sft", *parts, tmp_path / "run")
        if fraction:
            content["data"]["init_args"] |= {"val": None, "val_fraction": fraction}
        (tmp_path / "patient.yaml").write_text(yaml.safe_dump(content))
        monkeypatch.setattr("sys.argv", ["lit-align", "doctor", str(tmp_path / "patient.yaml")])
        assert entry() == status
