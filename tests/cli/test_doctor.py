"""Each check of the doctor on a patient that is well, and on one that has just that."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
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

from lit_align import InstructionDataModule, Lora, Network, SFTModule
from lit_align.__main__ import entry
from lit_align.cli.entry import main
from lit_align.config.errors import ConfigError
from lit_align.data.source import Source
from lit_align.doctor import gradients
from lit_align.doctor.exported import reloaded
from lit_align.doctor.settings import RATES, usual_high
from lit_align.doctor.template import template
from lit_align.types import Example, Segment

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

    def run(
        method: str, wrong: int = 0, model: Any = None, data: Any = None, trainer: Any = None
    ) -> tuple[dict[str, str], str]:
        content = config(method, *parts, tmp_path / "run", **({"max_epochs": 1} | (trainer or {})))
        content["model"]["init_args"]["optimizer"]["init_args"]["lr"] = 1e-4
        del content["model"]["init_args"]["schedule"]
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
    assert examined("sft", wrong=1, data={"max_length": 12})[0]["truncation"] == "wrong"
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
    cut = examined("sft", data={"max_length": 12, "truncate": "answer", "on_bad_row": "skip"}, wrong=3)[1]
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


def adam(rate: float) -> dict[str, Any]:
    return {"optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": rate}}}


@pytest.mark.parametrize(
    ("method", "rate", "level"),
    [
        ("sft", 10.0, "wrong"),
        ("dpo", 2e-3, "look"),
        ("reward", 1e-9, "look"),
        ("sft", 0.0, "wrong"),
        ("dpo", 1e-4, "ok"),
    ],
)
def test_rates_far_from_the_usual(method: str, rate: float, level: str, examined: Examined) -> None:
    levels, printed = examined(method, wrong=int(level == "wrong"), model=adam(rate))
    assert levels["rate"] == level, printed
    if rate:
        assert re.search(r"usual are \de-\d\d to \de-\d\d \(.*\d", printed)


def test_usual_rates_are_those_of_the_method_the_adapters_and_the_size(examined: Examined, tmp_path: Path) -> None:
    # Adapters take more: what is unusual for all weights is usual for them.
    network = {"network": {"name": str(tmp_path / "model"), "lora": {"r": 2}}}
    levels, printed = examined("dpo", model={**adam(2e-3), **network})
    assert levels["rate"] == "ok", printed
    assert "DPO with adapters" in printed
    assert usual_high(RATES["SFT", False], 7_000_000_000) == 1e-4
    assert usual_high(RATES["SFT", False], 125_000_000) == pytest.approx(2e-4)


def test_the_ends_of_a_run(examined: Examined) -> None:
    levels, printed = examined("sft", trainer={"max_epochs": None})
    assert levels["epochs"] == "look"
    assert "neither trainer.max_epochs nor trainer.max_steps is set: fit takes 1 epoch" in printed
    levels, printed = examined("sft", trainer={"max_epochs": 1000})
    assert levels["epochs"] == "look"
    assert "1e+03 epochs of 5 examples" in printed
    assert examined("sft", model={"schedule": None}, data={"batch_size": 64})[0]["batch"] == "look"
    assert examined("sft", trainer={"max_epochs": 9, "accumulate_grad_batches": 9})[0]["batch"] == "look"


def test_a_warm_up_longer_than_the_run(examined: Examined) -> None:
    def cosine(warmup: float) -> dict[str, Any]:
        return {"schedule": {"class_path": "lit_align.modules.Cosine", "init_args": {"warmup": warmup}}}

    assert "50 steps of warm-up in a run of 3: the full rate is never reached" in examined("sft", 1, cosine(50))[1]
    assert examined("sft", model=cosine(0.9))[0]["warm-up"] == "look"


def test_prices_and_precision(examined: Examined, tmp_path: Path) -> None:
    assert examined("dpo", model={"beta": 30.0})[0]["beta"] == "look"
    assert "beta" not in examined("dpo", model={"loss": "simpo"})[0]
    assert examined("ppo", model={"kl_coef": 5.0})[0]["price"] == "look"
    name = str(tmp_path / "model")
    assert examined("sft", model={"network": {"name": name, "dtype": "bfloat16"}})[0]["precision"] == "look"
    assert examined("sft", wrong=1, model={"network": {"name": name, "dtype": "float16"}})[0]["precision"] == "wrong"


def test_a_template_that_scores_what_the_user_says(parts: tuple[str, Path]) -> None:
    data = InstructionDataModule(parts[0], [Source(str(parts[1] / "demos.json"))], cache_dir="none")
    data.setup("fit")
    examples = [item.example for item in data.training_items(4)]
    assert [finding.level for finding in template(data, examples)] == ["ok"]
    encode = data.encode

    def scoring(every: bool) -> Callable[..., Any]:
        def made(row: Any, tally: Any) -> Any:
            (item,) = encode(row, tally)
            tokens = item.example.trunk.tokens
            return [item._replace(example=Example(Segment(tokens, [False] + [every] * (len(tokens) - 1))))]

        return made

    for every, says in ((True, "what the user says is scored, too"), (False, "it scores ''")):
        data.encode = scoring(every)  # type: ignore[method-assign]
        (finding,) = template(data, examples)
        assert (finding.level, says in finding.says) == ("wrong", True)
    unscored = [Example(Segment(e.trunk.tokens, [False] * e.num_tokens)) for e in examples]
    assert next(template(data, unscored)).says.startswith("no token of any example is scored")


@pytest.mark.parametrize("method", ["sft", "reward"])
@pytest.mark.parametrize("export", ["merged", "adapter"])
def test_the_export_is_the_model(method: str, export: str, examined: Examined, tmp_path: Path) -> None:
    lora = {"name": str(tmp_path / "model"), "lora": {"r": 2, "export": export}}
    levels, printed = examined(method, model={"network": lora})
    assert levels["export"] == "ok", printed
    assert "reloaded by plain transformers, gives the same" in printed


# Kills: adapters that are zeros when they are compared, as they are before training: any export would do.
def test_an_export_without_its_adapters_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = SFTModule(Network(tiny_folder(tmp_path / "model"), lora=Lora(r=2)))
    module.configure_model()
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    assert [finding.level for finding in reloaded(module)] == ["ok"]
    assert all(torch.equal(p, before[name]) for name, p in module.named_parameters())
    monkeypatch.setattr("lit_align.doctor.exported.check_export", lambda model, adapter, **options: unlike(model))
    (finding,) = reloaded(module)
    assert (finding.level, finding.says) == ("wrong", "the adapters are no zeros")


def unlike(model: torch.nn.Module) -> float:
    if all(p.detach().any() for name, p in model.named_parameters() if "lora_" in name):
        raise ValueError("the adapters are no zeros")
    return 0.0


def test_large_models_are_exported_when_it_is_asked_for(examined: Examined, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lit_align.doctor.exported.LARGE", 0)
    assert "lit-align doctor FILE --reload does it" in examined("sft")[1]
    module: Any = SimpleNamespace(exported=lambda: torch.nn.Linear(2, 2), network=None)
    monkeypatch.setattr("lit_align.doctor.exported.check_export", lambda model, adapter, **options: 0.0)
    (finding,) = reloaded(module, asked=True)
    assert finding.says.startswith("a whole model")


def test_what_torch_refuses_is_a_finding(examined: Examined, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise IndexError("index out of range in self")

    monkeypatch.setattr("lit_align.modules.sft.SFTModule.micro_step", broken)
    assert "fails with IndexError: index out of range in self" in examined("sft", wrong=1)[1]


def test_stages_of_a_pipeline(
    parts: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LIT_ALIGN_CACHE", str(tmp_path / "cache"))
    only("fit", monkeypatch)
    names = {"sft": parts[0], "dpo": "runs/x/sft/model"}
    for name, folder in names.items():
        content = config(name, folder, parts[1], tmp_path / "run", max_epochs=1)
        del content["out"]
        content["model"]["init_args"]["optimizer"]["init_args"]["lr"] = 10.0
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(content))
    stages = {name: {"fit": f"{name}.yaml"} for name in names}
    (tmp_path / "pipeline.yaml").write_text(yaml.safe_dump({"root": "runs/x", "stages": stages}, sort_keys=False))
    with pytest.raises(ConfigError, match="stages that would be spoilt: sft; see above"):
        main(["doctor", str(tmp_path / "pipeline.yaml")])
    printed = capsys.readouterr().out
    assert "[1/2] sft\n" in printed
    assert "wrong  rate" in printed
    assert "[2/2] dpo: not examined, for it starts from sft: run the pipeline up to there" in printed
