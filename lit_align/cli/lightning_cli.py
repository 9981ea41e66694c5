"""`lit-align fit | validate | test | predict | doctor`: LightningCLI for any module and data module."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import time
from argparse import ArgumentError
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml
from lightning import LightningDataModule, LightningModule, Trainer
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch.accelerators import MPSAccelerator
from lightning.pytorch.callbacks import Callback, ProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException

import lit_align.data
import lit_align.modules
import lit_align.rewards  # noqa: F401 - imported classes can be named in YAML without their module path
from lit_align.callbacks import (
    AtomicCheckpointIO,
    DivergenceGuard,
    HFExport,
    Manifest,
    MetricsCSV,
    PredictionsFile,
    RunCheckpoint,
    SaveRunConfig,
    Throughput,
    progress,
)
from lit_align.callbacks.checkpoint import BEST
from lit_align.callbacks.chosen import Which
from lit_align.callbacks.resume import KINDS, allowed
from lit_align.callbacks.wandb_run import go_on
from lit_align.cli.doctor_stages import examine_stages, is_pipeline
from lit_align.cli.ending import ending
from lit_align.cli.quiet import own_wandb_run, quiet_start
from lit_align.cli.run_folder import (
    check_elsewhere,
    check_writable,
    claimed_folder,
    requeued_folder,
    resumed_folder,
    way_back,
)
from lit_align.config import named_code
from lit_align.config.errors import ConfigError, explain
from lit_align.config.key_help import asked, key_help
from lit_align.config.lists import replace_lists
from lit_align.config.named_files import config_files
from lit_align.config.own_modules import importable
from lit_align.config.parser import FullNamesParser
from lit_align.data.files import expand
from lit_align.doctor import Finding, checksums, examine
from lit_align.utils import claim, secret
from lit_align.utils.display import printable, say
from lit_align.utils.model_folder import find_model, holds_model
from lit_align.utils.stopping import no_silent_exit


class AlignCLI(LightningCLI):
    """LightningCLI with one folder per run.

    A run writes everything to `--out`: config.yaml, metrics.csv, manifest.json, checkpoints/, model/. If the folder
    holds another run, the new run takes the next free name.
    """

    writes = True

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add `--out`, `--export`, `--resume.allow` and the options of the checkpoint callback."""
        parser.add_argument(
            "--out", type=str, default="runs/run", help="Folder of the run; may name environment variables."
        )
        parser.add_argument(
            "--export",
            type=Which | None,
            default=None,
            help="Weights in the folder model/: last or best; null for the best by checkpoint.monitor, else the last.",
        )
        parser.add_argument(
            "--resume.allow",
            type=list[str] | str | None,
            default=None,
            help=f"Changes that a resumed run accepts, [data, model] for two: {', '.join(KINDS)}.",
        )
        # Not `add_lightning_class_args`, which adds a callback to the Trainer even if enable_checkpointing is false.
        parser.add_class_arguments(RunCheckpoint, "checkpoint", fail_untyped=False, sub_configs=True)
        # Keep one checkpoint, the latest, under two names. With save_top_k: 0, Lightning saves only at the end.
        newest = {"save_last": "link", "save_top_k": 1, "enable_version_counter": False}
        parser.set_defaults({f"checkpoint.{key}": value for key, value in newest.items()})

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse; keep the later of two values for a list. Then check the code that the configuration names."""
        if args is None or isinstance(args, list):
            args = replace_lists(sys.argv[1:] if args is None else args)
        super().parse_arguments(parser, args)
        named_code.check(self.config.get(self.config.get("subcommand")))

    def _parse_ckpt_path(self) -> None:
        """No-op: Lightning would merge the `hyper_parameters` of the checkpoint into the configuration.

        Private, because nothing public keeps it from that.
        """

    def before_instantiate_classes(self) -> None:
        """Choose and claim the folder of the run, and set the paths and defaults that every run has."""
        config = self.config[self.subcommand]
        for key in ("trainer", "checkpoint"):
            if not hasattr(config[key], "as_dict"):
                raise ConfigError(f"{key}: expected a mapping of options, got {config[key]!r:.40}")
        _warn_of_secrets(config)
        config.out = expand(config.out)
        if self.subcommand == "fit" and config.ckpt_path is None and (again := requeued_folder(Path(config.out))):
            config.out, config.ckpt_path = str(again), "last"
        out = resumed_folder(config.get("ckpt_path"), Path(config.out)) if self.subcommand == "fit" else None
        if out is None:
            out = claimed_folder(Path(config.out), reuse=self.subcommand == "fit", say=say)
            if str(out) != config.out:
                say(f"{config.out} holds another run: this one goes to {out}{way_back(Path(config.out))}")
        else:
            claim.take(out, wait=True)
            if out.resolve() != Path(config.out).resolve():
                say(f"continues in {out}, the folder of the checkpoint")
        check_writable(out, str(self.subcommand))
        if config.get("ckpt_path") == "best" and self.subcommand == "fit":
            config.ckpt_path = str(Path(config.out) / "checkpoints" / BEST)
        config.out = str(out)
        if (pattern := config.checkpoint.filename) and (".." in Path(pattern).parts or Path(pattern).is_absolute()):
            raise ConfigError(f"checkpoint.filename: {pattern!r} leads out of the run's folder: give a name in it")
        if self.subcommand == "fit" and end_of_training(config.trainer):
            say("neither trainer.max_epochs nor trainer.max_steps is set: the run takes 1 epoch")
        config.checkpoint.dirpath = str(out / "checkpoints")
        config.trainer.default_root_dir = str(out)

    def instantiate_classes(self) -> None:
        """Instantiate as Lightning does; a `sys.exit` in the user's code becomes an error."""
        config = self.config[self.subcommand]
        resumes = self.writes and self.subcommand == "fit" and config.get("ckpt_path")
        with no_silent_exit(), go_on(Path(config.out), config.trainer if resumes else None) as line:
            super().instantiate_classes()
        if line:
            say(line)

    # Private, because nothing public is called around the Trainer's run.
    def _run_subcommand(self, subcommand: str) -> None:
        with no_silent_exit(Path(self.config[subcommand].out)):
            super()._run_subcommand(subcommand)

    def before_fit(self) -> None:
        """Note the time at which the fit starts."""
        self._began = time.monotonic()

    def after_fit(self) -> None:
        """Print the last figures and the folder of the model, unless both progress bar and logger are off."""
        config = self.config[self.subcommand]
        silent = config.trainer.enable_progress_bar is False and config.trainer.logger is False
        if self.trainer.is_global_zero and not silent:
            for line in ending(self.trainer, Path(config.out), time.monotonic() - self._began):
                say(line)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Build the Trainer with the loggers and callbacks of every run."""
        config = self.config[self.subcommand]
        out = Path(config.out)
        allow = allowed(config.resume.allow)
        self.save_config_kwargs = {"folder": out, "allow": allow}
        told = self.config_init[self.subcommand].trainer
        if told.accelerator == "auto" and MPSAccelerator.is_available():
            say("trainer.accelerator: cpu, because MPS has no float64, which exact sums need")
            kwargs["accelerator"] = "cpu"
        parents = _named(config)
        callbacks: list[Callback] = [Manifest(out, config.seed_everything, list(parents), parents, allow)]
        if told.enable_progress_bar is not False and not any(isinstance(c, ProgressBar) for c in _list(told.callbacks)):
            callbacks.append(progress())
        if self.subcommand == "fit":
            if not any(isinstance(c, DivergenceGuard) for c in _list(told.callbacks)):
                callbacks.append(DivergenceGuard())
            callbacks.append(Throughput())
            callbacks.append(HFExport(out / "model", run=out, which=config.export))
        if self.subcommand == "predict":
            callbacks.append(PredictionsFile(out / "completions.jsonl"))
        self.trainer_defaults["callbacks"] = [*callbacks, *self.checkpoints()]
        plugins = _list(told.plugins)
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            kwargs["plugins"] = [*plugins, AtomicCheckpointIO()]
        if told.logger is not False:
            kwargs["logger"] = [*_list(None if told.logger is True else told.logger), MetricsCSV(out)]
        trainer = super().instantiate_trainer(**kwargs)
        before = out / "config.yaml"
        check_elsewhere(trainer, out, before.read_text() if config.get("ckpt_path") and before.exists() else "")
        return trainer

    def checkpoints(self) -> list[Callback]:
        """Return the checkpoint callback of the run; an empty list if `enable_checkpointing` is false."""
        built = self.config_init[self.subcommand]
        return [] if built.trainer.enable_checkpointing is False else [built.checkpoint]


class DoctorCLI(AlignCLI):
    """Instantiate what `fit` would, write nothing, and examine it."""

    writes = False
    reload: bool | None = None
    unset: tuple[Finding, ...] = ()

    def before_instantiate_classes(self) -> None:
        """Claim no folder; set the same end of training as `fit`."""
        if end_of_training(self.config[self.subcommand].trainer):
            says = "neither trainer.max_epochs nor trainer.max_steps is set: fit takes 1 epoch"
            self.unset = (Finding("look", "epochs", f"{says}; set one"),)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Build a Trainer without the loggers and callbacks of a run."""
        self.save_config_callback = None
        self.trainer_defaults["callbacks"] = self.checkpoints()
        return LightningCLI.instantiate_trainer(self, logger=False)

    def _run_subcommand(self, subcommand: str) -> None:
        folders = checksums(_named(self.config[subcommand]))
        findings = [*folders, *self.unset, *examine(self.trainer, self.model, self.datamodule, self.reload)]
        say("\n".join(printable(finding) for finding in findings))
        if wrong := sum(finding.level == "wrong" for finding in findings):
            raise ConfigError(f"{wrong} of {len(findings)} findings would spoil the run: see above")


class _ReloadingCLI(DoctorCLI):
    """`doctor --reload`: compare a model of any size with its export."""

    reload = True


class PartsCLI(DoctorCLI):
    """Instantiate the module and the data module of a configuration, and run nothing."""

    def _run_subcommand(self, subcommand: str) -> None:
        """No-op."""


def built(args: list[str]) -> tuple[LightningModule, LightningDataModule | None]:
    """Build module and data module from a configuration, as `fit` would.

    Args:
        args: a command line of `fit`.

    Raises:
        ConfigError: the configuration cannot be used.
    """
    with quiet_start(), importable(config_files(args), args):
        cli = _lightning(args, PartsCLI)
    return cli.model, cli.datamodule


@rank_zero_only
def _warn_of_secrets(config: Any) -> None:
    secret.warn_of(config.as_dict())


def end_of_training(trainer: Any) -> bool:
    """Set one epoch if a configuration sets no end of training: Lightning's 1,000 epochs would overfit any data.

    Args:
        trainer: the `trainer` part of the configuration; `max_epochs` is set in it.

    Returns:
        True if the configuration set no end.
    """
    unset = trainer.max_epochs is None and trainer.max_steps in (None, -1) and trainer.max_time is None
    if unset:
        trainer.max_epochs = 1
    return unset


def _list(value: Any) -> list[Any]:
    """Convert None, one value or several values to a list."""
    return [] if value is None else list(value) if isinstance(value, Iterable) and type(value) is not str else [value]


def _parents(config: Any) -> list[str]:
    """Model folders that a configuration names."""
    return list(_named(config))


# Folders of the run itself, where an earlier attempt may have left a model.
_OWN_FOLDERS = ("out", "trainer.default_root_dir", "checkpoint.dirpath")


def _named(config: Any) -> dict[str, list[str]]:
    """Folders of models and adapters in a configuration, each with the keys that name it."""
    found: dict[str, list[str]] = {}

    def visit(value: Any, key: str = "") -> None:
        if isinstance(value, (dict, list)):
            for name, item in value.items() if isinstance(value, dict) else enumerate(value):
                visit(item, f"{key}.{name}" if key else str(name))
        # os.path returns False for a chat template; pathlib raises because the text is too long for a name.
        elif isinstance(value, str) and key not in _OWN_FOLDERS and os.path.isdir(value):
            with contextlib.suppress(ValueError):  # ignore a folder with several models
                value = find_model(value)
            if holds_model(value):
                found.setdefault(value, []).append(key)

    visit(config.as_dict())
    return dict(sorted(found.items()))


def run_lightning(args: list[str]) -> AlignCLI | None:
    """Run one of LightningCLI's commands or `doctor`, in this process.

    Args:
        args: the command line without the program name. `doctor` also takes a pipeline file and `--reload`.

    Returns:
        The CLI object; None for the help of a key, and for the stages of a pipeline.

    Raises:
        ConfigError: the configuration cannot be used.
    """
    if asked(args):
        with importable(config_files(args), args):
            say(key_help(args))
        return None
    cli: type[AlignCLI] = AlignCLI
    if args[0] == "doctor":
        if args[1:] and is_pipeline(args[1]):
            examine_stages(args[1], lambda file: run_lightning(["doctor", str(file), *args[2:]]))
            return None
        cli = _ReloadingCLI if "--reload" in args else DoctorCLI
        args = [word for word in args if word != "--reload"]
        args = ["fit", *(["-c"] if args[1:] and not args[1].startswith("-") else []), *args[1:]]
    with claim.released(), quiet_start(), own_wandb_run(), importable(config_files(args), args), _safe_print(args):
        return _lightning(args, cli)


@contextlib.contextmanager
def _safe_print(args: list[str]) -> Iterator[None]:
    """Print the configuration of `--print_config` without secrets, and without marks that turn text around."""
    if not any(word.startswith("--print_config") for word in args):
        yield
        return
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            yield
    finally:
        text = printed.getvalue()
        content = yaml.safe_load(text)
        kept = secret.redacted(content)
        if kept != content or printable(text, lines=True) != text:  # YAML has escapes for what is no ASCII
            text = yaml.safe_dump(kept, sort_keys=False)
        sys.stdout.write(text)


def _texts(args: list[str]) -> list[str]:
    """The command line and the content of its files."""
    return [*args, *(file.read_text() for file in config_files(args) if file.is_file())]


def _lightning(args: list[str], cli: type[AlignCLI]) -> AlignCLI:
    named_code.restrict()
    try:
        return cli(
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            seed_everything_default=0,
            save_config_callback=SaveRunConfig,
            auto_configure_optimizers=False,
            trainer_defaults={"num_sanity_val_steps": 0, "log_every_n_steps": 1, "enable_model_summary": False},
            parser_kwargs={
                "exit_on_error": False,
                **{name: {"exit_on_error": False} for name in AlignCLI.subcommands()},
            },
            parser_class=FullNamesParser,
            args=args,
        )
    except ArgumentError as error:
        raise ConfigError(explain(str(error))) from error
    except ValueError as error:
        # If a class refuses a value, jsonargparse wraps the error in the same tree as a parsing error.
        if str(error).startswith("Does not validate"):
            raise ConfigError(explain(str(error))) from error
        raise
    except TypeError as error:
        # `dict_kwargs` pass through the parser unchecked.
        if "got an unexpected keyword argument" not in str(error) or not any("dict_kwargs" in t for t in _texts(args)):
            raise
        raise ConfigError(explain(str(error))) from error
    except MisconfigurationException as error:
        raise ConfigError(" ".join(str(error).split())) from error
    except RuntimeError as error:  # torch raises this anywhere in the parent when a worker dies
        if not str(error).startswith("DataLoader worker"):
            raise
        raise ChildProcessError(
            "a data-loader worker was killed, most often because memory ran out: lower data.num_workers (0 starts no "
            f"worker), and continue with --ckpt_path last ({' '.join(str(error).split())})"
        ) from error
