"""The commands that are not LightningCLI's: pipeline, demo, sweep, chat, report."""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lit_align
from lit_align.cli.evaluate import evaluate
from lit_align.cli.feedback_commands import agreement, annotate, judge, revise
from lit_align.cli.one_line_parser import OneLineParser
from lit_align.config.errors import ConfigError, explain
from lit_align.config.named_files import check_files
from lit_align.config.own_modules import importable
from lit_align.utils import limits
from lit_align.utils.display import say
from lit_align.utils.model_folder import find_model, stage_models
from lit_align.utils.stopping import no_silent_exit


def experiments() -> Path:
    """Folder of the YAML files that ship with the package: in the source tree, or in the installed package."""
    package = Path(lit_align.__file__).parent
    source = package.parent / "experiments"
    return source if (source / "sandbox" / "pipeline.yaml").exists() else package / "experiments"


def pipeline(args: list[str]) -> dict[str, float]:
    """Run the stages of a file in order; go on where an earlier run stopped."""
    parser = OneLineParser(prog="lit-align pipeline", description=pipeline.__doc__, allow_abbrev=False)
    parser.add_argument("file", help="pipeline YAML")
    _pipeline_options(parser)
    told = parser.parse_args(args)
    return _run(told, told.file)


def demo(args: list[str]) -> dict[str, float]:
    """The embedded world, end to end: pretrain, SFT, reward model, PPO and DPO, evaluation, report; no network."""
    parser = OneLineParser(prog="lit-align demo", description=demo.__doc__, allow_abbrev=False)
    _pipeline_options(parser)
    told = parser.parse_args(args)
    told.out = told.out or "runs/demo"
    return _run(told, experiments() / "sandbox" / "pipeline.yaml")


def sweep(args: list[str]) -> dict[str, Any]:
    """Run the points of a W&B sweep file here, one after another; go on where an earlier run stopped."""
    parser = OneLineParser(prog="lit-align sweep", description=sweep.__doc__, allow_abbrev=False)
    parser.add_argument("file", help="sweep YAML: method grid or random")
    parser.add_argument("--out", help="output folder; runs/sweeps/NAME without it")
    parser.add_argument("--count", type=int, help="points to run; the file's run_cap without it")
    _resume_option(parser)
    told = parser.parse_args(args)
    from lit_align.pipeline.sweep import Sweep, table

    run = Sweep(told.file, told.out, told.count)
    with importable([run.file]):
        result = run.run(_lightning, allow=_allowed(told.allow))
    page = _report(run.out)
    say(f"{table(result)}\nfigures in {run.out / 'sweep.json'}, page in {page}")
    return result


def chat(args: list[str]) -> None:
    """Talk to a model in the terminal."""
    parser = OneLineParser(prog="lit-align chat", description=chat.__doc__, allow_abbrev=False)
    parser.add_argument("model", help="folder of a model, a run or a pipeline, or name on the hub")
    parser.add_argument("--temperature", type=float, default=0.7, help="0 takes the most probable token")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="of an answer")
    parser.add_argument("--system", help="a first message")
    told = parser.parse_args(args)
    name = find_model(told.model, last=True)
    if name != told.model:
        others = [str(model) for model in stage_models(Path(told.model)) if str(model) != name]
        say(f"model: {name}" + (f" (others: {', '.join(others)})" if others else ""))
    from lit_align.cli.chatting import Chat, converse

    lines = iter(lambda: _asked("> "), "")
    converse(Chat(name, told.temperature, told.max_new_tokens, told.system), lines)


def export(args: list[str]) -> str:
    """Write the model of a checkpoint, or of a run's folder, as a folder that plain transformers loads."""
    parser = OneLineParser(prog="lit-align export", description=export.__doc__, allow_abbrev=False)
    parser.add_argument("source", type=Path, help="folder of a run, or a .ckpt file of one")
    parser.add_argument("out", type=Path, help="folder to write; an earlier export there is replaced, nothing else is")
    parser.add_argument(
        "--which", choices=("last", "best"), help="checkpoint of a run's folder; best where a metric was monitored"
    )
    parser.add_argument(
        "--role", choices=("policy", "value", "reward"), help="model of the run; PPO has policy and value"
    )
    parser.add_argument("--adapter", action="store_true", help="write the adapter alone; without it, it is merged")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="of the weights; that of training without it"
    )
    parser.add_argument("--config", type=Path, help="config.yaml of the run, for a checkpoint that lies elsewhere")
    told = parser.parse_args(args)
    from lit_align.cli.exporting import export_run  # torch and transformers take seconds to import

    said = export_run(told.source, told.out, told.which, told.role, told.adapter, told.dtype, told.config)
    say(said)
    return said


def _asked(prompt: str) -> str:
    # Replace bytes that are not UTF-8: tokenizers accept replacement characters.
    if isinstance(sys.stdin, io.TextIOWrapper) and sys.stdin.errors != "replace":
        sys.stdin.reconfigure(errors="replace")
    try:
        return input(prompt)
    except EOFError:
        return ""
    except KeyboardInterrupt:
        print()
        return ""


def report(args: list[str]) -> Path:
    """Write report.html for the folder of a run, a pipeline or a sweep; of several, one page that compares them."""
    parser = OneLineParser(prog="lit-align report", description=report.__doc__, allow_abbrev=False)
    parser.add_argument("folders", type=Path, nargs="+", metavar="RUN", help="folder of a run, a pipeline or a sweep")
    parser.add_argument(
        "--out", type=Path, help="page to write; without it report.html in RUN, or comparison.html here for several"
    )
    told = parser.parse_args(args)
    if len(told.folders) == 1 and told.out is None:
        return _report(told.folders[0])
    from lit_align.report import write_comparison  # matplotlib takes a second to import

    page = write_comparison(told.folders, told.out or Path("comparison.html"))
    say(f"page in {page}")
    return page


def _pipeline_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", help="output folder")
    parser.add_argument("--seed", type=int, default=0, help="added to every seed of the stages")
    parser.add_argument("--quick", action="store_true", help="a trial: the file's shrunken sizes")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="STAGE.KEY=VALUE",
        help="override a value of a stage; may be repeated",
    )
    _resume_option(parser)


def _resume_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--resume.allow",
        dest="allow",
        metavar="KINDS",
        help="changes since then that are accepted, as in data,model; see `lit-align fit --help`",
    )


def _allowed(told: str | None) -> frozenset[str]:
    if told is None:
        return frozenset()
    from lit_align.callbacks.resume import allowed  # imports torch

    return allowed(told)


def _run(told: argparse.Namespace, file: str | Path) -> dict[str, float]:
    overrides = dict(_override(text) for text in told.set)
    from lit_align.pipeline.stages import Pipeline  # imports torch, which help can do without

    allow = _allowed(told.allow)
    run = Pipeline(file, told.out, told.seed, told.quick, overrides)
    with importable([run.file, *(stage.file for stage in run.stages)], map(str, overrides.values())):
        summary = run.run(_command, _step, allow=allow)
    path = _report(run.out)
    say(f"{summary['seconds']:.0f} s in all; figures in {run.out / 'summary.json'}, page in {path}")
    return summary


def _override(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(f"--set wants STAGE.KEY=VALUE, got {text!r}")
    try:
        return key, json.loads(value)
    except RecursionError as error:
        raise ConfigError(f"--set {key}: the value is nested too deeply") from error
    except json.JSONDecodeError:
        return key, value


def _command(kind: str, file: Path, further: list[str]) -> None:
    _lightning([kind, "-c", str(file), *further])


def _lightning(args: list[str]) -> Any:
    """Run one of LightningCLI's commands, in this process."""
    check_files(args)
    from lit_align.cli.lightning_cli import run_lightning

    return run_lightning(args)


def _step(file: Path, folder: Path) -> dict[str, float]:
    """Instantiate the class of a `call` stage and run it."""
    from lit_align.config import named_code
    from lit_align.config.parser import FullNamesParser
    from lit_align.pipeline.stages import Step

    parser = FullNamesParser(exit_on_error=False)
    parser.add_argument("--step", type=Step)
    named_code.restrict()
    try:
        config = parser.parse_object({"step": limits.load_yaml(limits.read_text(file), file)})
        named_code.check(config)
        step: Step = parser.instantiate(config).step
    except (TypeError, ValueError, argparse.ArgumentError) as error:
        raise ConfigError(f"{file}: {explain(str(error))}") from error
    with no_silent_exit():
        return step.run(folder)


def _report(folder: Path) -> Path:
    from lit_align.report import write_report  # matplotlib takes a second to import

    return write_report(folder)


COMMANDS: dict[str, Callable[[list[str]], Any]] = {
    "demo": demo,
    "pipeline": pipeline,
    "sweep": sweep,
    "chat": chat,
    "report": report,
    "export": export,
    "evaluate": evaluate,
    "annotate": annotate,
    "agreement": agreement,
    "judge": judge,
    "revise": revise,
}
