"""The command line: find the command, and import only what it needs.

`fit`, `validate`, `test`, `predict` and `doctor` are in `lightning_cli.py`, the others in `commands.py`. Nothing here
imports torch: help, the version and a misspelt command answer at once.
"""

from __future__ import annotations

import difflib
import sys
from typing import Any

from lit_align import __version__
from lit_align.cli.commands import COMMANDS
from lit_align.config.errors import ConfigError
from lit_align.config.named_files import check_files

LIGHTNING = ("fit", "validate", "test", "predict", "doctor")

USAGE = """usage: lit-align COMMAND [options]

  fit, validate, test, predict   LightningCLI: -c FILE.yaml, dotted overrides (--model.network.name=...), --out FOLDER,
                                 --print_config; `lit-align fit --help` lists them; `--model.help PPOModule`,
                                 `--data.train.help`, `--model.network.lora.help` explain keys, at any depth
  doctor FILE                    what would spoil a fit with this configuration, in seconds
  demo                           the embedded world end to end: SFT, reward model, PPO and DPO, with a report
  pipeline FILE                  the stages of a file, in order, resumable
  sweep FILE                     the points of a W&B sweep file, one after another, resumable
  chat FOLDER                    talk to a model in the terminal
  export RUN OUT                 the model of a run's folder or of a checkpoint file, as a folder for transformers
  evaluate KIND ...              measures with intervals: of a reward model on pairs, of a policy, of data sets
  annotate FILE                  a page where people compare completions; --export FILE writes their labels
  judge FILE                     labels from a chat server, a language model or a reward model, in both orders
  revise FILE                    critique and revision by principles, as demonstrations
  agreement LABELS               whether labels can be trusted: kappas, alpha, biases, and soft labels to train on
  report RUN [RUN ...]           the page of a run, a pipeline or a sweep; of several runs, one that compares them

`COMMAND --help` says more. Errors are one line; set LIT_ALIGN_DEBUG=1 for the traceback.
"""


def main(args: list[str] | None = None) -> Any:
    """Run a command, in this process.

    Args:
        args: the command line without the program's name; null for that of the process.

    Raises:
        ConfigError: a configuration that cannot be used.
    """
    args = sys.argv[1:] if args is None else args
    if not args or args[0] in ("-h", "--help"):
        print(USAGE)
        return None
    if args[0] == "--version":
        print(f"lit-align {__version__}")
        return None
    if args[0] in COMMANDS:
        return COMMANDS[args[0]](args[1:])
    if args[0] not in LIGHTNING:
        known = [*LIGHTNING, *COMMANDS]
        close = difflib.get_close_matches(args[0], known, n=1)
        hint = f", did you mean {close[0]!r}?" if close else ":"
        raise ConfigError(f"unknown command {args[0]!r}{hint} choose {', '.join(known)}")
    check_files(args)
    from lit_align.cli.lightning_cli import run_lightning

    return run_lightning(args)
