"""Literal secrets of a configuration are in nothing that is written; references to the environment stay."""

from __future__ import annotations

import json
import os
import stat
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from support.configs import config
from support.parsers import only
from support.runs import write_rows
from support.tiny import tiny_folder

from lit_align.cli.entry import main
from lit_align.utils import secret
from lit_align.utils.secret import REDACTED, redact_text, redacted

KEY = "s3cr3t-Zq8xv7"
LITERAL: list[dict[str, Any]] = [
    {"headers": {"Authorization": f"Bearer {KEY}"}},
    {"headers": {"authorization": f"Basic {KEY}"}},
    {"headers": {"X-Own": KEY, "Content-Type": "application/json"}},
    {"headers": {"api-key": KEY}},
    {"headers": {"Cookie": f"session={KEY}"}},
    {"headers": [f"Authorization: Bearer {KEY}", "Accept: */*"]},
    {"headers": f"{{Authorization: {KEY}}}"},
    {"extra_headers": {"X-Goog": KEY}},
    {"cookies": {"session": KEY}},
    {"auth": ["user", KEY]},
    {"apiKey": KEY},
    {"OPENAI_API_KEY": KEY},
    {"password": 123456},
    {"hf_token": KEY},
    {"token": KEY},
    {"client_secret": KEY},
    {"storage_options": {"key": KEY, "secret": KEY, "anon": False}},
    {"url": f"https://user:{KEY}@host/score"},
    {"url": f"https://{KEY}@host/score"},
    {"url": f"https://host/score?api_key={KEY}&x=1"},
    {"url": f"https://host/score?x=1&token={KEY}"},
    {"url": f"https://host/s?X-Amz-Signature={KEY}&X-Amz-Credential={KEY}"},
    {"url": f"https://host/s#access_token={KEY}"},
    {"path": f"zip://*.csv::https://user:{KEY}@host/rows.zip"},
    {"text": f"{{headers: {{Authorization: {KEY}}}}}"},
    {"any": "sk-proj-abcdefghijklmnop1234"},
    {"any": "see hf_abcdefghijklmnopqrstuvwx for it"},
    {"any": "AKIAABCDEFGHIJKLMNOP"},
    {"a": [{"b": {"headers": {"Authorization": KEY}}}]},
    {"model.init_args.reward.init_args.headers.Authorization": KEY},
]
PLAIN: list[dict[str, Any]] = [
    {"headers": {"Authorization": "Bearer ${TOKEN}"}},
    {"headers": {"Authorization": "$TOKEN", "Content-Type": "application/json", "Accept-Language": "en"}},
    {"headers": {"X-Api-Key": "${KEY}"}},
    {"url": "https://host:8000/score?model=a&n=3"},
    {"url": "https://${USER}:${PASSWORD}@host/score?token=${TOKEN}"},
    {"url": "ssh://git@host/x"},
    {"path": "C:/me@home/x", "other": "file:/me@home/x", "twice": {"a": [{"b": 1}, {"b": 2}]}},
    {"tokenizer": "Qwen/Qwen3", "eos_token": "</s>", "pad_token": "<pad>", "max_new_tokens": 5, "tokens": [1]},
    {"use_auth_token": True, "token": None, "key": "value", "author": "me", "signature_columns": ["a"]},
    {"chat_template": "{% for m in messages %}{{ m['role'] }}: {{ m.content }}@{% endfor %}"},
    {"columns": {"instruction": "question"}, "stop": ["[/INST]"], "seed": 3, "lr": 1e-5},
    {"text": "{a: [1, 2], b: sk-short}"},
    {"name": "a@b", "path": "data/rows.jsonl?x", "secretary": "Ann", "monkey": "x"},
]


@pytest.mark.parametrize("value", LITERAL, ids=str)
def test_a_literal_secret_is_replaced(value: dict[str, Any]) -> None:
    shown = json.dumps(redacted(value))
    assert KEY not in shown
    assert REDACTED in shown
    for part in ("sk-proj-abc", "hf_abc", "AKIAABC", "123456"):
        assert part not in shown
    assert list(secret.found(value))
    assert redacted(redacted(value)) == redacted(value)
    assert not list(secret.found(redacted(value)))


@pytest.mark.parametrize("value", PLAIN, ids=str)
def test_what_is_no_secret_stays(value: dict[str, Any]) -> None:
    assert redacted(value) == value
    assert not list(secret.found(value))


def test_no_shipped_configuration_holds_one() -> None:
    for file in sorted((Path(__file__).parents[2] / "experiments").rglob("*.yaml")):
        assert not list(secret.found(yaml.safe_load(file.read_text()))), file


def test_a_line_of_a_log_holds_none() -> None:
    line = f"cannot open https://u:{KEY}@host/a?sig={KEY}: Authorization: Bearer {KEY}"
    assert KEY not in redact_text(line)
    assert KEY not in redact_text(f"https:/u:{KEY}@h/x")  # as a path object writes it


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    place = tmp_path_factory.mktemp("parts")
    write_rows(place)
    return tiny_folder(place / "policy"), place


class Taken:
    """What a logger is given."""

    configs: list[Any] = []  # noqa: RUF012


def files_with(place: Path, text: str) -> list[str]:
    """Files that hold a text, checkpoints unpacked."""
    holding = []
    for path in sorted(place.rglob("*")):
        if not path.is_file():
            continue
        content = path.read_bytes()
        if path.suffix == ".ckpt":
            content += repr(
                {k: v for k, v in torch.load(path, weights_only=True).items() if k != "state_dict"}
            ).encode()
        if text.encode() in content:
            holding.append(str(path.relative_to(place)))
    return holding


def with_reward(content: dict[str, Any], headers: dict[str, str], url: str) -> dict[str, Any]:
    """A run whose second reward is a server that is never asked."""
    server = {"class_path": "lit_align.EndpointReward", "init_args": {"url": url, "headers": headers}}
    content["model"]["init_args"]["reward"] = {
        "class_path": "support.rewards.Either",
        "init_args": {"asked": content["model"]["init_args"]["reward"], "silent": server},
    }
    return content


def test_a_run_leaves_no_secret(
    parts: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    only("fit", monkeypatch)
    monkeypatch.setenv("WANDB_MODE", "offline")
    content = config("ppo", *parts, tmp_path / "run", max_steps=4)
    logger = "lightning.pytorch.loggers.CSVLogger"
    content["trainer"]["logger"] = {"class_path": logger, "init_args": {"save_dir": str(tmp_path / "logs")}}
    headers = {"Authorization": f"Bearer {KEY}", "X-Ref": "${NOT_SET}"}
    with_reward(content, headers, f"https://host/score?api_key={KEY}")
    (tmp_path / "in.yaml").write_text(yaml.safe_dump(content))
    with pytest.warns(UserWarning, match=r"headers\.Authorization.*\$\{NAME\}"):
        main(["fit", "-c", str(tmp_path / "in.yaml")])
    (tmp_path / "in.yaml").unlink()
    assert files_with(tmp_path, KEY) == []
    assert {"run/config.yaml", "run/model/README.md"} <= set(files_with(tmp_path, REDACTED))
    assert "run/config.yaml" in files_with(tmp_path, "${NOT_SET}")
    assert KEY not in "".join(capsys.readouterr())
    assert stat.S_IMODE((tmp_path / "run" / "config.yaml").stat().st_mode) == 0o600
    # A resumed run compares what is left, and goes on.
    (tmp_path / "in.yaml").write_text(yaml.safe_dump(content))
    last = str(tmp_path / "run" / "checkpoints" / "last.ckpt")
    with pytest.warns(UserWarning, match="Authorization"):
        main(["fit", "-c", str(tmp_path / "in.yaml"), "--ckpt_path", last, "--trainer.max_steps=8"])
    (tmp_path / "in.yaml").unlink()
    assert files_with(tmp_path, KEY) == []


def test_a_redacted_value_is_not_sent(parts: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    only("fit", monkeypatch)
    content = config("ppo", *parts, tmp_path / "run", max_steps=4)
    server = {"url": "http://127.0.0.1:9/score", "headers": {"Authorization": REDACTED}}
    content["model"]["init_args"]["reward"] = {"class_path": "lit_align.EndpointReward", "init_args": server}
    (tmp_path / "in.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError, match="redacted"):
        main(["fit", "-c", str(tmp_path / "in.yaml")])


def test_a_run_without_secrets_is_readable(parts: tuple[str, Path], tmp_path: Path, monkeypatch: Any) -> None:
    only("fit", monkeypatch)
    old = os.umask(0o022)
    try:
        (tmp_path / "in.yaml").write_text(yaml.safe_dump(config("sft", *parts, tmp_path / "run", max_steps=1)))
        main(["fit", "-c", str(tmp_path / "in.yaml")])
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "run" / "config.yaml").stat().st_mode) == 0o644


def test_a_pipeline_leaves_no_secret(tmp_path: Path) -> None:
    """The stage still gets the value."""
    stage = {"class_path": "support.rewards.Tells", "init_args": {"headers": {"Authorization": KEY, "X": "${NOT_SET}"}}}
    (tmp_path / "stage.yaml").write_text(yaml.safe_dump(stage))
    (tmp_path / "pipeline.yaml").write_text(
        yaml.safe_dump({"root": "runs/p", "stages": {"one": {"call": "stage.yaml"}}})
    )
    with pytest.warns(UserWarning, match=r"one\.init_args\.headers\.Authorization.*\$\{NAME\}"):
        main(["pipeline", str(tmp_path / "pipeline.yaml"), "--out", str(tmp_path / "out")])
    assert files_with(tmp_path / "out", KEY) == []
    assert "one/stage.yaml" in files_with(tmp_path / "out", REDACTED)
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["one/length"] == len(KEY)


def test_a_sweep_leaves_no_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    from lit_align.pipeline.sweep import Sweep, table

    content = {
        "method": "grid",
        "metric": {"name": "val/loss"},
        "parameters": {"model.reward.headers.Authorization": {"values": [KEY]}, "seed_everything": {"values": [1]}},
        "command": ["lit-align", "fit", "${args}"],
    }
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(content))
    got: list[list[str]] = []

    def fit(args: list[str]) -> None:
        got.append(args)
        out = Path(next(word for word in args if word.startswith("--out=")).removeprefix("--out="))
        out.mkdir(parents=True, exist_ok=True)
        (out / "metrics.csv").write_text("epoch,step,val/loss\n0,1,1.0\n")

    with pytest.warns(UserWarning, match="Authorization"):
        result = Sweep(tmp_path / "sweep.yaml", tmp_path / "out").run(fit)
    assert f"--model.reward.headers.Authorization={KEY}" in got[0]
    assert files_with(tmp_path / "out", KEY) == []
    assert KEY not in table(result) + "".join(capsys.readouterr())


def test_hyper_parameters_of_a_users_module_are_saved_without(tmp_path: Path) -> None:
    from lit_align.callbacks import AtomicCheckpointIO

    held = {"headers": {"Authorization": KEY}, "lr": 0.1}
    names = ("hyper_parameters", "datamodule_hyper_parameters")
    content = {"state_dict": {}, "pytorch-lightning_version": "2.6.6", **dict.fromkeys(names, held)}
    AtomicCheckpointIO().save_checkpoint(content, tmp_path / "a.ckpt")
    read = AtomicCheckpointIO().load_checkpoint(tmp_path / "a.ckpt")
    assert all(read[name] == {"headers": {"Authorization": REDACTED}, "lr": 0.1} for name in names)
    assert content["hyper_parameters"] == held


@pytest.mark.parametrize(
    "text", ["a." * 100_000 + "://", "eyJaaaaaaaa-" * 50_000 + ".eyJ", "://" * 50_000, "?a" * 100_000 + "://"]
)
def test_a_hostile_text_takes_no_time(text: str) -> None:
    started = time.monotonic()
    redact_text(text)
    assert time.monotonic() - started < 5
