"""The command line in this process: what a run leaves, where it writes, and what it never touches."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from jsonargparse import Namespace
from safetensors.torch import load_file
from support.configs import METHODS, config
from support.metrics import steady
from support.runs import write_rows
from support.tiny import tiny_folder
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from lit_align import __version__
from lit_align.__main__ import entry
from lit_align.callbacks.manifest import model_hash
from lit_align.cli.entry import main
from lit_align.cli.lightning_cli import _parents
from lit_align.cli.run_folder import free_folder, requeued_folder, resumed_folder

LEFT = {"config.yaml", "metrics.csv", "manifest.json", "checkpoints", "model"}


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A model and rows; nothing here is written to."""
    folder = tmp_path_factory.mktemp("parts")
    write_rows(folder)
    return tiny_folder(folder / "model"), folder


@pytest.fixture
def place(parts: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to run in, with a YAML file of each method that writes to `run` in it."""
    monkeypatch.setenv("LIT_ALIGN_CACHE", str(tmp_path / "cache"))
    for method in METHODS:
        content = config(method, *parts, tmp_path / "run", max_steps=8 if method == "ppo" else 4)
        (tmp_path / f"{method}.yaml").write_text(yaml.safe_dump(content))
    return tmp_path


def everything(folder: Path) -> dict[str, bytes]:
    """Every file under a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def rows_of(metrics: Path) -> list[dict[str, str]]:
    with metrics.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("method", METHODS)
def test_what_every_run_leaves(place: Path, parts: tuple[str, Path], method: str) -> None:
    command = main(["fit", "-c", str(place / f"{method}.yaml"), "--seed_everything=3"])
    run = place / "run"
    assert {path.name for path in run.iterdir()} == LEFT
    assert command.trainer.global_step == (8 if method == "ppo" else 4)
    # The configuration, resolved.
    left = yaml.safe_load((run / "config.yaml").read_text())
    assert left["seed_everything"] == 3
    assert left["out"] == str(run)
    assert left["model"]["init_args"]["network"]["weights"] == "pretrained"
    # Metrics.
    rows = rows_of(run / "metrics.csv")
    assert {"epoch", "step"} < set(rows[0])
    assert {name.split("/")[0] for name in rows[0]} - {"epoch", "step"} <= {"train", "val", "ppo"}
    assert any(row["ppo/kl" if method == "ppo" else "train/loss"] for row in rows)
    # What it was made of.
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["seed"] == 3
    assert manifest["packages"]["torch"] == version("torch")
    assert manifest["parents"] == {parts[0]: model_hash(Path(parts[0]))}
    assert [entry["part"] for entry in manifest["data"]] == ["train", "val"]
    assert all(entry["fingerprint"] and entry["counts"]["examples"] for entry in manifest["data"])
    # A checkpoint to resume from, and a folder that plain transformers loads.
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == command.trainer.global_step
    auto = AutoModelForSequenceClassification if method == "reward" else AutoModelForCausalLM
    loaded = auto.from_pretrained(run / "model").state_dict()
    trained = (command.model.scorer if method == "reward" else command.model.policy).hf.state_dict()
    assert all(torch.equal(loaded[name], trained[name].to(loaded[name])) for name in loaded)
    assert AutoTokenizer.from_pretrained(run / "model").chat_template


def test_a_folder_that_holds_a_run_is_not_written_into(place: Path, capsys: pytest.CaptureFixture) -> None:
    args = ["fit", "-c", str(place / "sft.yaml")]
    main(args)
    first = everything(place / "run")
    main([*args, "--seed_everything=2"])
    assert f"{place / 'run'} holds another run: this one goes to {place / 'run-2'}" in capsys.readouterr().out
    assert {path.name for path in (place / "run-2").iterdir()} == LEFT
    # Nor do the commands that look at a run write into it.
    for command in ("validate", "test"):
        main([command, "-c", str(place / "run" / "config.yaml")])
    main(["predict", "-c", str(place / "ppo.yaml")])
    assert everything(place / "run") == first
    assert (place / "run-3" / "completions.jsonl").exists()
    assert rows_of(place / "run-3" / "metrics.csv")[-1]["test/loss"]


def test_free_folders(tmp_path: Path) -> None:
    assert free_folder(tmp_path / "a") == tmp_path / "a"
    for name in ("a", "a-2", "a-4"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").touch()
    assert free_folder(tmp_path / "a") == tmp_path / "a-3"
    # A folder without a run is free, whatever else is in it.
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "notes.txt").touch()
    assert free_folder(tmp_path / "b") == tmp_path / "b"


def test_validate_test_and_predict(place: Path, parts: tuple[str, Path]) -> None:
    main(["fit", "-c", str(place / "sft.yaml")])
    trained = ["-c", str(place / "sft.yaml"), f"--model.network.name={place / 'run' / 'model'}"]
    last = [row["val/loss"] for row in rows_of(place / "run" / "metrics.csv") if row["val/loss"]][-1]
    validated = main(["validate", *trained, f"--out={place / 'validated'}"])
    assert float(validated.trainer.callback_metrics["val/loss"]) == pytest.approx(float(last), rel=1e-5)
    assert float(rows_of(place / "validated" / "metrics.csv")[0]["val/loss"]) == pytest.approx(float(last), rel=1e-5)
    tested = main(["test", *trained, f"--out={place / 'tested'}"])
    assert float(tested.trainer.callback_metrics["test/loss"]) == pytest.approx(float(last), rel=1e-5)
    checkpoint = str(place / "run" / "checkpoints" / "last.ckpt")
    # A checkpoint serves as well as the exported folder, whatever else has changed.
    other = ["--data.val_batch_size=3", f"--out={place / 'again'}"]
    again = main(["validate", "-c", str(place / "sft.yaml"), "--ckpt_path", checkpoint, *other])
    assert float(again.trainer.callback_metrics["val/loss"]) == pytest.approx(float(last), rel=1e-5)
    prompts = config("ppo", parts[0], parts[1], place / "answers")
    prompts["model"] = {"class_path": "lit_align.SFTModule", "init_args": {"network": {"name": parts[0]}}}
    (place / "predict.yaml").write_text(yaml.safe_dump(prompts))
    sampling = ["--model.sampling.max_new_tokens=5", "--model.sampling.samples=3"]
    main(["predict", "-c", str(place / "predict.yaml"), *sampling])
    answers = [json.loads(line) for line in (place / "answers" / "completions.jsonl").read_text().splitlines()]
    assert len(answers) == 8
    assert all(len(row["completions"]) == len(row["finished"]) == 3 for row in answers)
    manifest = json.loads((place / "answers" / "manifest.json").read_text())
    assert manifest["parents"] == {parts[0]: model_hash(Path(parts[0]))}


def test_the_printed_configuration_has_no_secrets_and_turns_no_text(place: Path, capsys: pytest.CaptureFixture) -> None:
    source = "https://me:geheim@host/rows.jsonl?sig=geheim2"
    name = "a\u202eb\u2066c"
    args = [f"--data.init_args.train.path={source}", f"--data.init_args.cache_dir={name}"]
    with pytest.raises(SystemExit):
        main(["fit", "-c", str(place / "sft.yaml"), *args, "--print_config"])
    printed = capsys.readouterr().out
    assert "geheim" not in printed
    assert "<redacted>@host" in printed
    assert "\u202e" not in printed
    assert yaml.safe_load(printed)["data"]["init_args"]["cache_dir"] == name


def test_the_printed_configuration_is_the_run(place: Path, capsys: pytest.CaptureFixture) -> None:
    args = ["-c", str(place / "sft.yaml"), "--model.optimizer.lr=0.003"]
    main(["fit", *args])
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(["fit", *args, "--print_config"])
    assert not ended.value.code
    (place / "printed.yaml").write_text(capsys.readouterr().out)
    assert yaml.safe_load((place / "printed.yaml").read_text())["model"]["init_args"]["optimizer"]["init_args"][
        "lr"
    ] == pytest.approx(0.003)
    # Both what is printed and what a run leaves say all there is to say.
    for name, file in (("printed", place / "printed.yaml"), ("repeated", place / "run" / "config.yaml")):
        main(["fit", "-c", str(file), f"--out={place / name}"])
        assert steady(place / name / "metrics.csv") == steady(place / "run" / "metrics.csv")
        model, other = (load_file(place / out / "model" / "model.safetensors") for out in ("run", name))
        assert all(torch.equal(model[key], other[key]) for key in model)


def test_files_and_arguments_override_in_their_order(place: Path, parts: tuple[str, Path]) -> None:
    (place / "more.yaml").write_text("trainer: {max_steps: 1}\nseed_everything: 5\n")
    command = main(
        [
            "fit",
            *("-c", str(place / "sft.yaml"), "-c", str(place / "more.yaml")),
            # As a W&B sweep writes its ${args}: full paths, with an equals sign.
            "--model.init_args.optimizer.init_args.lr=0.25",
            "--data.init_args.batch_size=3",
            "--seed_everything=6",
        ]
    )
    assert command.trainer.max_steps == 1
    assert command.trainer.optimizers[0].defaults["lr"] == 0.25
    assert command.datamodule.batch_size == 3
    assert command.config.fit.seed_everything == 6
    assert command.model.network.name == parts[0]


def test_classes_are_named_without_their_module(place: Path, parts: tuple[str, Path]) -> None:
    model = ["--model=SFTModule", f"--model.network.name={parts[0]}", "--model.schedule=Linear"]
    data = ["--data=InstructionDataModule", f"--data.tokenizer={parts[0]}", "--data.cache_dir=none"]
    train = json.dumps([{"path": str(parts[1] / "demos.json")}])
    trainer = ["--trainer.max_steps=1", "--trainer.accelerator=cpu", f"--out={place / 'out'}"]
    command = main(["fit", *model, *data, f"--data.train={train}", *trainer])
    assert type(command.model.schedule).__name__ == "Linear"
    assert command.trainer.global_step == 1


def test_a_refused_resumption_changes_nothing(place: Path) -> None:
    args = ["fit", "-c", str(place / "sft.yaml")]
    main(args)
    before = everything(place / "run")
    last = str(place / "run" / "checkpoints" / "last.ckpt")
    with pytest.raises(ValueError, match=r"data\.init_args\.seed \(0, now 9\)"):
        main([*args, "--ckpt_path", last, "--data.seed=9"])
    with pytest.raises(OSError, match=r"no\.ckpt"):
        main([*args, "--ckpt_path", "no.ckpt"])
    assert everything(place / "run") == before


def test_a_resumed_run_stays_in_its_folder(place: Path) -> None:
    args = ["fit", "-c", str(place / "sft.yaml")]
    main(args)
    first = rows_of(place / "run" / "metrics.csv")
    last = str(place / "run" / "checkpoints" / "last.ckpt")
    main([*args, "--ckpt_path", last, "--trainer.max_steps=6"])
    assert not (place / "run-2").exists()
    rows = rows_of(place / "run" / "metrics.csv")
    assert [row["step"] for row in rows if row["train/loss"]] == ["0", "1", "2", "3", "4", "5"]
    assert rows[: len(first)] == first


@pytest.fixture
def wandb_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Weights & Biases without a network and without a word, in a folder of its own."""
    wandb = pytest.importorskip("wandb")
    folder = tmp_path / "tracking"
    folder.mkdir()
    monkeypatch.chdir(folder)
    for name, value in {"MODE": "offline", "SILENT": "true", "DIR": str(folder), "CONSOLE": "off"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    yield folder
    wandb.teardown()


WANDB = "--trainer.logger={class_path: WandbLogger, init_args: {project: lit_align}}"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_weights_and_biases_by_one_line(place: Path, wandb_folder: Path) -> None:
    import wandb

    args = ["fit", "-c", str(place / "sft.yaml"), WANDB]
    versions = [main(args).trainer.logger.version for _ in range(2)]
    # Two runs in one process are two runs there, and in our folders.
    assert len(set(versions)) == 2
    assert wandb.run is None
    tracked = sorted(path.name.rpartition("-")[2] for path in (wandb_folder / "wandb").glob("offline-run-*"))
    assert tracked == sorted(versions)
    for name in ("run", "run-2"):
        assert {path.name for path in (place / name).iterdir()} == LEFT
        steps = [row["step"] for row in rows_of(place / name / "metrics.csv") if row["train/loss"]]
        assert steps == ["0", "1", "2", "3"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_answers_as_tables_of_weights_and_biases(
    place: Path, wandb_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_MODE")
    logger = "--trainer.logger={class_path: lightning.pytorch.loggers.WandbLogger, init_args: {offline: true}}"
    table = (
        "--trainer.callbacks=[{class_path: lit_align.callbacks.CompletionsTable, init_args: {prompts: [say a bee]}}]"
    )
    for name in ("run", "run-2"):
        main(["fit", "-c", str(place / "dpo.yaml"), logger, table, "--model.sampling.max_new_tokens=5"])
        assert {path.name for path in (place / name).iterdir()} == {*LEFT, "said.jsonl"}
        assert yaml.safe_load((place / name / "config.yaml").read_text())["out"] == str(place / name)
    said = json.loads((place / "run" / "said.jsonl").read_text())
    files = sorted((wandb_folder / "wandb").glob("offline-run-*/files/media/table/val/completions_*.table.json"))
    assert len(files) == 2
    for file in files:
        left = json.loads(file.read_text())
        assert left["columns"] == list(said)
        assert left["data"] == [list(said.values())]
    assert (said["step"], said["prompt"]) == (3, "say a bee")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore:There is a wandb run already in progress:UserWarning")
def test_a_run_of_the_users_own_is_not_ended(place: Path, wandb_folder: Path) -> None:
    import wandb

    own = wandb.init(project="mine", mode="offline", dir=str(wandb_folder))
    main(["fit", "-c", str(place / "sft.yaml"), WANDB])
    assert wandb.run is own
    own.finish()


def test_what_can_be_left_out(place: Path, capsys: pytest.CaptureFixture) -> None:
    without = ("logger", "enable_checkpointing", "enable_progress_bar")
    main(["fit", "-c", str(place / "sft.yaml"), *(f"--trainer.{name}=false" for name in without)])
    assert {path.name for path in (place / "run").iterdir()} == LEFT - {"metrics.csv", "checkpoints"}
    assert capsys.readouterr().out == ""
    main(["fit", "-c", str(place / "sft.yaml"), f"--out={place / 'trial'}", "--trainer.fast_dev_run=true"])
    assert not (place / "trial" / "config.yaml").exists()


def test_loggers_and_progress_bars_of_the_users_own(place: Path) -> None:
    bar = "--trainer.callbacks=[{class_path: lightning.pytorch.callbacks.TQDMProgressBar}]"
    csv_logger = f"{{class_path: CSVLogger, init_args: {{save_dir: {place}, name: own}}}}"
    for name, loggers in (("one", csv_logger), ("several", f"[{csv_logger}]")):
        command = main(
            ["fit", "-c", str(place / "sft.yaml"), f"--out={place / name}", bar, f"--trainer.logger={loggers}"]
        )
        assert type(command.trainer.progress_bar_callback).__name__ == "TQDMProgressBar"
        assert type(command.trainer.logger).__name__ == "CSVLogger"
        assert {path.name for path in (place / name).iterdir()} == LEFT
        assert Path(command.trainer.loggers[0].log_dir, "metrics.csv").exists()


def test_a_run_speaks_of_itself_alone(place: Path, caplog: pytest.LogCaptureFixture) -> None:
    main(["fit", "-c", str(place / "sft.yaml")])
    said = [record.getMessage() for record in caplog.records]
    assert [line.partition(" ")[0] for line in said] == ["train", "val", "memory:", "vocabulary", "peak"]
    assert all(line.endswith("demos.json: 8 rows, 8 examples") for line in said[:2])


def test_help_and_version(capsys: pytest.CaptureFixture) -> None:
    for args in ([], ["-h"], ["--help"]):
        assert main(args) is None
        assert "usage: lit-align COMMAND" in capsys.readouterr().out
    main(["--version"])
    assert capsys.readouterr().out == f"lit-align {__version__}\n"


def test_what_the_user_can_mend_ends_in_one_line_on_standard_error(tmp_path: Path) -> None:
    file = tmp_path / "broken.yaml"
    file.write_text("model: [\n")
    command = [sys.executable, "-m", "lit_align", "fit", "-c", str(file)]
    package = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([package, os.environ.get("PYTHONPATH", "")])}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    assert ended.returncode == 1
    assert ended.stdout == ""
    assert ended.stderr.startswith(f"lit-align: {file}, line 2: not valid YAML: ")
    assert ended.stderr.count("\n") == 1


# Kills: the notes left out.
def test_what_is_noted_of_an_error_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    def fails(*_: Any) -> None:
        error = ValueError("no number")
        error.add_note("the prompts:\n'say a'")
        raise error

    monkeypatch.setattr("lit_align.cli.entry.main", fails)
    assert entry() == 1
    assert capsys.readouterr().err == "lit-align: no number; the prompts: 'say a'\n"


def test_the_traceback_is_there_for_who_asks(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(sys, "argv", ["lit-align", "train"])
    assert entry() == 1
    assert capsys.readouterr().err.startswith("lit-align: unknown command 'train'")
    monkeypatch.setenv("LIT_ALIGN_DEBUG", "1")
    with pytest.raises(ValueError, match="unknown command"):
        entry()
    monkeypatch.setattr(sys, "argv", ["lit-align", "--version"])
    assert entry() == 0


def test_the_models_that_a_configuration_names_are_its_parents(place: Path, parts: tuple[str, Path]) -> None:
    content: dict[str, Any] = yaml.safe_load((place / "ppo.yaml").read_text())
    value = tiny_folder(place / "value", seed=1)
    content["model"]["init_args"]["reference"] = {"name": value}
    (place / "ppo.yaml").write_text(yaml.safe_dump(content))
    main(["fit", "-c", str(place / "ppo.yaml"), "--trainer.max_steps=4"])
    parents = json.loads((place / "run" / "manifest.json").read_text())["parents"]
    assert parents == {folder: model_hash(Path(folder)) for folder in (parts[0], value)}
    assert len(set(parents.values())) == 2


def test_a_chat_template_is_no_path(tmp_path: Path) -> None:
    """It is asked whether it names a model's folder; as a path it would be too long for the file system."""
    template = "{% for message in messages %}{{ message['content'] }}{% endfor %}" * 20
    config = Namespace(data=Namespace(chat_template=template), model=Namespace(name=tiny_folder(tmp_path / "model")))
    assert _parents(config) == [str(tmp_path / "model")]


def test_a_checkpoint_is_resumed_in_its_own_run(tmp_path: Path) -> None:
    def folder(checkpoint: str | None) -> Path | None:
        return resumed_folder(checkpoint, tmp_path / "given")

    (tmp_path / "run-2" / "checkpoints").mkdir(parents=True)
    checkpoint = str(tmp_path / "run-2" / "checkpoints" / "last.ckpt")
    assert folder(None) is None
    assert folder(checkpoint) is None  # it lies in no run
    (tmp_path / "run-2" / "config.yaml").touch()
    assert folder(checkpoint) == tmp_path / "run-2"
    assert folder("last") == tmp_path / "given"


# Kills: the run of another name; another job's; an earlier number.
def test_a_requeued_job_finds_its_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def began(name: str, job: str) -> None:
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text(json.dumps({"slurm_job": job}))

    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    for name, job in [("run-large", "7"), ("run-2-old", "7"), ("run2", "7"), ("run", "6"), ("run-11", "6")]:
        began(name, job)
    assert requeued_folder(tmp_path / "run") is None
    for name in ("run-2", "run-10", "run-9"):
        began(name, "7")
    assert requeued_folder(tmp_path / "run") == tmp_path / "run-10"
    assert requeued_folder(tmp_path / "nowhere" / "run") is None
    monkeypatch.setenv("SLURM_RESTART_COUNT", "0")
    assert requeued_folder(tmp_path / "run") is None
