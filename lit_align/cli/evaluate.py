"""`lit-align evaluate policy|reward|data`: measures of a model or a data set, from flags or a file."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from lit_align.config.errors import ConfigError, explain
from lit_align.config.own_modules import importable
from lit_align.utils import limits
from lit_align.utils.stopping import no_silent_exit


class Kind(NamedTuple):
    """One of the three.

    Attributes:
        target: module and class that measures.
        positionals: arguments without a flag, in order, by the class's name of them.
        help: in a sentence.
    """

    target: str
    positionals: tuple[str, ...]
    help: str


KINDS = {
    "reward": Kind(
        "lit_align.evaluation.evaluate_reward.EvaluateReward",
        ("model", "pairs"),
        "a reward model on judged answers: accuracy beside longer-wins and shorter-wins, calibration, best-of-n",
    ),
    "policy": Kind(
        "lit_align.evaluation.evaluate_policy.EvaluatePolicy",
        ("model", "prompts"),
        "a language model: length, refusals, diversity, rewards, win rate and KL against a reference, calibration",
    ),
    "data": Kind(
        "lit_align.evaluation.evaluate_data.EvaluateData",
        ("sources",),
        "instruction and preference sets side by side: length, format, duplicates, overlap, what is preferred",
    ),
}

USAGE = """usage: lit-align evaluate KIND FILE.yaml [--KEY VALUE ...]
       lit-align evaluate KIND {positionals} [--KEY VALUE ...]

{kinds}

  --out FOLDER    where results go: evaluation.json, report.html, figures; runs/evaluate/KIND-... without it. The same
                  command goes on where an earlier one stopped.
  --KEY VALUE     any key of the file; VALUE is JSON or text, as in --category kind, --resamples 500,
                  --pairs.columns '{{"chosen": "better"}}'; a model or data set takes its keys as JSON, too, as in
                  '{{"path": "a.jsonl", "columns": {{"prompt": "question", "completion": "answer"}}}}'
  --help KIND     the keys of a kind
"""


def usage(kind: str | None = None) -> str:
    """What the command takes, or what a kind takes: its keys as the class's docstring explains them."""
    shown = [kind] if kind else list(KINDS)
    positionals = " ".join(name.upper() for name in KINDS[kind].positionals) if kind else "MODEL-OR-DATA ..."
    lines = "\n".join(f"  {name:<14}{KINDS[name].help}" for name in shown)
    text = USAGE.format(positionals=positionals, kinds=lines)
    return text.replace("KIND", kind) if kind else text


def evaluate(args: list[str]) -> dict[str, float] | None:
    """Measure a policy, a reward model or a data set; go on where an earlier run stopped."""
    words = [word for word in args if word not in ("-h", "--help")]
    kind = words[0] if words else None
    if kind is not None and kind not in KINDS:
        raise ConfigError(f"evaluate {kind!r}: choose one of {', '.join(KINDS)} (see lit-align evaluate --help)")
    if kind is None or len(words) < len(args):
        print(usage(kind))
        return None
    given, flags, out = parse(kind, words[1:])
    options: dict[str, Any] = {}
    file = None
    if len(given) == 1 and given[0].endswith((".yaml", ".yml")):
        file = Path(given[0])
        if not file.is_file():
            raise ConfigError(f"evaluate {kind}: there is no file {str(file)!r}")
        options = limits.load_yaml(limits.read_text(file), file)
        if not isinstance(options, dict):
            raise ConfigError(f"{file}: expected keys and values, got {type(options).__name__}")
        out = out or options.pop("out", None)
    else:
        options = dict(zip(positional_names(kind, given), positional_values(kind, given), strict=True))
    for key, value in flags:
        put(options, key, value)
    with importable([file] if file else []), no_silent_exit():
        step = instantiate(kind, options, str(file or f"evaluate {kind}"))
        return step.run(Path(out) if out else default_out(kind, options, file))


def parse(kind: str, words: list[str]) -> tuple[list[str], list[tuple[str, Any]], str | None]:
    """Positionals, flags with their values, and --out."""
    given: list[str] = []
    flags: list[tuple[str, Any]] = []
    out = None
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            given.append(word)
            continue
        key, equals, value = word.removeprefix("--").partition("=")
        if not equals:
            if not rest:
                raise ConfigError(f"evaluate {kind}: --{key} needs a value")
            value = rest.pop(0)
        if key == "out":
            out = value
        else:
            flags.append((key.replace("-", "_"), value_of(value)))
    return given, flags, out


def positional_names(kind: str, given: list[str]) -> tuple[str, ...]:
    """Names of the positionals; the last takes all that follow, where it is a list (`data`)."""
    names = KINDS[kind].positionals
    if len(given) < len(names) or (len(given) > len(names) and names[-1] not in MANY):
        wanted = " ".join(name.upper() for name in names)
        raise ConfigError(f"evaluate {kind} takes {wanted} or one FILE.yaml, got {' '.join(given)!r}")
    return names


# Arguments that take several values.
MANY = {"sources"}


def positional_values(kind: str, given: list[str]) -> list[Any]:
    """A value for each of the positionals."""
    names = KINDS[kind].positionals
    values = [value_of(word) if word.startswith("{") else word for word in given]
    if names[-1] in MANY:
        return [*values[: len(names) - 1], values[len(names) - 1 :]]
    return values


def value_of(text: str) -> Any:
    """JSON, or text."""
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError):
        return text


def put(options: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key; a text that stands for a source or a network becomes its main key."""
    first, _, inner = key.partition(".")
    if not inner:
        options[first] = value
        return
    held = options.get(first)
    if isinstance(held, str):
        from lit_align.data.source import keys_of

        held = {"name": held} if first in ("model", "second", "reference") else keys_of(held)
    options[first] = held if isinstance(held, dict) else {}
    put(options[first], inner, value)


def instantiate(kind: str, options: dict[str, Any], origin: str) -> Any:
    """The class of a kind, with its options checked.

    Raises:
        ConfigError: a key or a value that it does not take.
    """
    from lit_align.config import named_code
    from lit_align.config.parser import FullNamesParser
    from lit_align.pipeline.stages import Step

    parser = FullNamesParser(exit_on_error=False)
    parser.add_argument("--step", type=Step)
    named_code.restrict()
    try:
        config = parser.parse_object({"step": {"class_path": KINDS[kind].target, "init_args": options}})
        named_code.check(config)
        return parser.instantiate(config).step
    except (TypeError, ValueError, argparse.ArgumentError) as error:
        raise ConfigError(f"{origin}: {explain(str(error))}".replace("step.", "")) from error


def default_out(kind: str, options: dict[str, Any], file: Path | None) -> Path:
    """A folder named after the file, or after what is measured."""
    if file is not None:
        return Path("runs/evaluate") / file.stem
    parts = [options.get(name) for name in KINDS[kind].positionals]
    flat = [one for part in parts for one in (part if isinstance(part, list) else [part])]
    keyed = [part.get("path") or part.get("name") or part if isinstance(part, dict) else part for part in flat]
    words = [short_name(str(name)) for name in keyed]
    return Path("runs/evaluate") / f"{kind}-{'-'.join(words)}"[:120]


def short_name(name: str) -> str:
    """The last part of a path that tells something, as a file's name."""
    parts = [part for part in name.split("/") if part and part != "model"]
    return re.sub(r"[^\w.-]+", "_", parts[-1].split(".jsonl")[0].split(".json")[0]) if parts else "x"
