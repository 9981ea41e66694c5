"""Run a sweep file of Weights & Biases locally: one point after another, without an account.

    name: dpo
    method: grid
    metric: {name: val/accuracy, goal: maximize}
    parameters:
      model.init_args.beta: {values: [0.05, 0.1, 0.2]}
    command: [lit-align, fit, -c, experiments/sandbox/dpo.yaml, "${args}"]

The folder of a point is named after its arguments. After a value is added to the file, only the new points run.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from lit_align.callbacks.manifest import environment
from lit_align.callbacks.metrics_csv import last_values
from lit_align.config.named_files import config_files
from lit_align.pipeline.stage_files import check, inputs
from lit_align.pipeline.stages import DONE, load_yaml, read_json, set_aside, write_json
from lit_align.utils import claim, display, secret
from lit_align.utils.disk import sync_tree, write_whole
from lit_align.utils.names import check_name
from lit_align.utils.owned import check_output

# Keys of W&B's schema. Keys that are not used below matter to W&B only.
_KEYS = {
    "name", "method", "metric", "parameters", "command", "run_cap", "early_terminate",
    "program", "project", "entity", "description",
}  # fmt: skip
# A grid with more points than this is a mistake.
MAX_POINTS = 10_000
# Words that may precede `lit-align` in a command.
_LAUNCHERS = ("${env}", "${interpreter}", "/usr/bin/env", "python", "python3", "-m")

# Draw a number, given a random generator and the keys of the parameter.
_DRAW: dict[str, Callable[[Random, Mapping[str, Any]], float]] = {
    "uniform": lambda random, told: random.uniform(told["min"], told["max"]),
    "int_uniform": lambda random, told: random.randint(told["min"], told["max"]),
    "log_uniform": lambda random, told: math.exp(random.uniform(told["min"], told["max"])),
    "log_uniform_values": lambda random, told: math.exp(random.uniform(math.log(told["min"]), math.log(told["max"]))),
    "normal": lambda random, told: random.gauss(told.get("mu", 0.0), told.get("sigma", 1.0)),
    "log_normal": lambda random, told: math.exp(random.gauss(told.get("mu", 0.0), told.get("sigma", 1.0))),
}
_DISTRIBUTIONS = (*_DRAW, *(f"q_{name}" for name in _DRAW if name != "int_uniform"))

# Runs a fit, given the arguments of `lit-align`.
Fit = Callable[[list[str]], Any]


@dataclass
class Point:
    """One run of a sweep.

    Attributes:
        parameters: values of the swept keys.
        args: the command line, as W&B would write it.
        key: hash of everything that decides the result: arguments and configuration files.
    """

    parameters: dict[str, Any]
    args: list[str]
    key: str

    @property
    def name(self) -> str:
        """Name of the folder of the point."""
        return hashlib.sha256(json.dumps(sorted(_args(self.parameters))).encode()).hexdigest()[:8]


class Sweep:
    """A checked sweep file.

    Args:
        file: the sweep's YAML.
        out: output folder; null takes runs/sweeps/NAME.
        count: number of points to run; null takes the file's `run_cap`, or the whole grid.

    Raises:
        ValueError: a key is missing or wrong, or needs W&B's server; names the key.
    """

    def __init__(self, file: str | Path, out: str | Path | None = None, count: int | None = None) -> None:
        self.file = Path(file)
        self.told = load_yaml(self.file)
        if unknown := sorted(map(str, set(self.told) - _KEYS)):
            raise self._wrong(unknown[0], f"is not a key of a sweep; keys are {', '.join(sorted(_KEYS))}")
        try:
            self.name = check_name(self.told.get("name", self.file.stem), "name")
        except ValueError as error:
            raise ValueError(f"{self.file}: {error}; it names the folder in runs/sweeps") from error
        self.out = Path(out) if out is not None else Path("runs/sweeps") / self.name
        self.metric, self.goal = self._metric()
        self.method = self.told.get("method")
        if self.method not in ("grid", "random"):
            methods = "grid and random run locally, bayes with `wandb sweep` and `wandb agent`"
            raise self._wrong("method", f"is {self.method!r}: {methods}")
        self.command = self._command()
        parameters = self.told.get("parameters")
        if not isinstance(parameters, dict) or not parameters:
            raise self._wrong("parameters", "must be a mapping of dotted keys of the configuration")
        self.parameters: dict[str, dict[str, Any]] = {}
        for key, told in parameters.items():
            self.parameters[str(key)] = self._parameter(f"parameters.{key}", told)
        self.count = self.told.get("run_cap") if count is None else count
        if self.count is not None and (type(self.count) is not int or not 1 <= self.count <= MAX_POINTS):
            raise self._wrong("run_cap", f"is {self.count!r}, expected a number of points, 1 to {MAX_POINTS:,}")
        if self.method == "random" and self.count is None:
            raise self._wrong("run_cap", "is missing: random points have no end; give it, or --count")
        self._check_size()
        self.points = list(itertools.islice(self._points(), self.count))

    def _check_size(self) -> None:
        """Count the points of a grid before building any of them."""
        total = math.prod(len(told.get("values", ())) for told in self.parameters.values())
        if self.method == "grid" and self.count is None and total > MAX_POINTS:
            raise self._wrong(
                "parameters", f"have {total:,} points, more than {MAX_POINTS:,}: list fewer values, or give run_cap"
            )

    def _wrong(self, key: str, problem: str) -> ValueError:
        return ValueError(f"{self.file}: {key} {problem}")

    def _metric(self) -> tuple[str, str]:
        told = self.told.get("metric")
        if not isinstance(told, dict) or not isinstance(told.get("name"), str):
            raise self._wrong("metric.name", "is missing: name a column of the runs' metrics.csv, such as val/loss")
        goal = told.get("goal", "minimize")
        if goal not in ("minimize", "maximize"):
            raise self._wrong("metric.goal", f"is {goal!r}, expected minimize or maximize")
        return told["name"], goal

    def _command(self) -> list[str]:
        """Words after `lit-align`, without W&B's logger and without --ckpt_path, which is decided per point."""
        words = self.told.get("command")
        if not isinstance(words, list) or words.count("${args}") != 1:
            raise self._wrong("command", 'must be a list of words, "${args}" one of them')
        rest = list(itertools.dropwhile(lambda word: word in _LAUNCHERS, map(str, words)))
        if rest[:1] not in (["lit-align"], ["lit_align"]) or rest[1:2] != ["fit"]:
            raise self._wrong("command", f"starts {' '.join(map(str, words[:3]))!r}, expected lit-align fit")
        for file in config_files(rest):
            load_yaml(file)
        left_out = re.compile(r"--trainer\.logger=.*WandbLogger.*|--ckpt_path=.*", re.DOTALL)
        return [word for word in rest[1:] if not left_out.fullmatch(word)]

    def _parameter(self, key: str, told: Any) -> dict[str, Any]:
        """Check a parameter; return its values or its distribution."""
        if not isinstance(told, dict):
            raise self._wrong(key, "must be a mapping with value, values or a distribution")
        if "parameters" in told:
            raise self._wrong(key, "nests parameters: write one dotted key for each")
        if "value" in told or "values" in told:
            values = [told["value"]] if "value" in told else told["values"]
            if not isinstance(values, list) or not values:
                raise self._wrong(f"{key}.values", "must be a list with at least one value")
            if None in values:
                raise self._wrong(key, 'holds null, which W&B hands over as None: write the text "null"')
            weights = told.get("probabilities")
            if weights is not None and (not isinstance(weights, list) or len(weights) != len(values)):
                raise self._wrong(f"{key}.probabilities", f"must be a list of {len(values)}, one for each value")
            if self.method == "grid":  # a value that is listed twice is one point
                values = list({str(value): value for value in values}.values())
            return {"values": values, "weights": weights}
        return self._distribution(key, told)

    def _distribution(self, key: str, told: dict[str, Any]) -> dict[str, Any]:
        whole = all(isinstance(told.get(end), int) for end in ("min", "max"))
        kind = told.get("distribution", "int_uniform" if whole else "uniform")
        if kind not in _DISTRIBUTIONS:
            raise self._wrong(f"{key}.distribution", f"is {kind!r}, expected one of {', '.join(_DISTRIBUTIONS)}")
        needed = () if "normal" in kind else ("min", "max")
        for name in (*needed, *(name for name in ("mu", "sigma", "q") if name in told)):
            if not isinstance(told.get(name), (int, float)) or isinstance(told[name], bool):
                hint = " (YAML reads 1e-5 as text: write 1.0e-5)" if isinstance(told.get(name), str) else ""
                raise self._wrong(f"{key}.{name}", f"is {told.get(name)!r}, expected a number{hint}")
        if needed and not told["min"] < told["max"]:
            raise self._wrong(f"{key}.min", f"is {told['min']}, which is not below max, {told['max']}")
        if kind == "int_uniform" and not whole:
            raise self._wrong(f"{key}.distribution", "is int_uniform: min and max must be whole numbers")
        if kind.endswith("log_uniform_values") and told["min"] <= 0:
            raise self._wrong(f"{key}.min", f"is {told['min']}: a logarithm needs more than 0")
        if self.method == "grid":
            if kind != "int_uniform":
                raise self._wrong(key, "is drawn at random: a grid wants values")
            values = range(told["min"], told["max"] + 1)
            if told["max"] - told["min"] >= MAX_POINTS:
                raise self._wrong(key, f"has {told['max'] - told['min'] + 1:,} values, more than {MAX_POINTS:,}")
            return {"values": list(values), "weights": None}
        return {**told, "distribution": kind}

    def _points(self) -> Iterator[Point]:
        """Yield each point once: a grid in file order; random points seeded by sweep name, seed and number."""
        seen: set[str] = set()
        for parameters in self._grid() if self.method == "grid" else self._random():
            point = self._point(parameters)
            if point.name not in seen:
                seen.add(point.name)
                yield point

    def _grid(self) -> Iterator[dict[str, Any]]:
        for values in itertools.product(*(told["values"] for told in self.parameters.values())):
            yield dict(zip(self.parameters, values, strict=True))

    def _random(self) -> Iterator[dict[str, Any]]:
        # Limit the draws: a few values have few distinct combinations.
        seed = self.parameters.get("seed_everything", {}).get("values", [0])[0]
        for number in range(100 * (self.count or 0)):
            random = Random(f"{self.name}/{seed}/{number}")
            # Draw in order of names, so that the order in the file does not matter.
            drawn = {key: _draw(random, self.parameters[key]) for key in sorted(self.parameters)}
            yield {key: drawn[key] for key in self.parameters}

    def _point(self, parameters: dict[str, Any]) -> Point:
        at = self.command.index("${args}")
        args = [*self.command[:at], *_args(parameters), *self.command[at + 1 :]]
        contents = [load_yaml(file) for file in config_files(args)]
        return Point(parameters, args, hashlib.sha256(json.dumps([args, contents]).encode()).hexdigest()[:16])

    # Running.

    def run(
        self, fit: Fit, say: Callable[[str], None] = display.say, allow: frozenset[str] = frozenset()
    ) -> dict[str, Any]:
        """Run all points that are not done yet; write `sweep.json` and return its content.

        An interrupted point resumes from its last checkpoint. A failed point is recorded, and tried again the next time
        that the sweep runs. `allow` names accepted kinds of change, as `--resume.allow` does.

        Raises:
            ValueError: data or models of a finished point have changed, no run logs the metric, all points failed, or
                another sweep holds the folder.
            FileExistsError: the folder holds files of the user under names that will be written.
        """
        with claim.held(self.out, say):
            return self._run(fit, say, allow)

    def _run(self, fit: Fit, say: Callable[[str], None], allow: frozenset[str]) -> dict[str, Any]:
        check_output(self.out, ("sweep.json", "manifest.json"), [point.name for point in self.points])
        secret.warn_of(self.told, f"{self.file}: ")
        if "early_terminate" in self.told:
            say("early_terminate is W&B's: here every point runs to its end")
        spent: list[float] = []
        records: list[dict[str, Any]] = []
        manifest = {**environment(), "sweep": str(self.file)}
        write_whole(self.out / "manifest.json", json.dumps(manifest, indent=2) + "\n")
        for number, point in enumerate(self.points, start=1):
            heading = f"[{number}/{len(self.points)}] {self.describe(point)}"
            record = read_json(self.out / point.name / DONE)
            if record.get("key") == point.key:
                again = f"remove {self.out / point.name} to run the point again"
                check(f"point {point.name}", Path(), record.get("inputs") or {}, allow, say, again)
                say(f"{heading}: done before, {self.metric} {_number(record['metric'])}")
            else:
                say(f"{heading} ...")
                record = self._run_point(point, fit, say, allow)
                spent.append(record["seconds"])
                left = sum(spent) / len(spent) * (len(self.points) - number)
                said = record.get("error") or f"{self.metric} {_number(record['metric'])}"
                say(f"{heading}: {said}, {record['seconds']:.0f} s; at most {left:.0f} s left")
            records.append({"folder": point.name, "parameters": point.parameters, **record})
            result = self._result(records)
            write_json(self.out / "sweep.json", result)
        if all("error" in record for record in records):
            raise ValueError(f"{self.file}: no point has ended well; the first said: {records[0]['error']}")
        return result

    def _run_point(self, point: Point, fit: Fit, say: Callable[[str], None], allow: frozenset[str]) -> dict[str, Any]:
        folder = self.out / point.name
        begun = read_json(folder / "point.json")
        if begun and begun["key"] != point.key:
            say(f"  its configuration has changed; the earlier run is kept in {set_aside(folder)}")
            begun = {}
        folder.mkdir(parents=True, exist_ok=True)
        checkpoint = folder / "checkpoints" / "last.ckpt"
        resumes = any(checkpoint.parent.glob("*.ckpt"))
        if not resumes:
            # Files of an attempt without a checkpoint are useless, and would push the run to another folder name.
            (folder / "config.yaml").unlink(missing_ok=True)
            (folder / "metrics.csv").unlink(missing_ok=True)
        last = ["--ckpt_path", str(checkpoint) if checkpoint.exists() else "last"] if resumes else []
        last += [f"--resume.allow=[{','.join(sorted(allow))}]"] if resumes and allow else []
        record = {"key": point.key, "seconds": begun.get("seconds", 0.0)}
        write_json(folder / "point.json", record)
        started = time.monotonic()
        try:
            fit([*point.args, f"--out={folder}", *last])
        except Exception as error:  # the other points may still succeed
            record["error"] = " ".join(f"{type(error).__name__}: {error}".split())
        finally:
            record["seconds"] = round(record["seconds"] + time.monotonic() - started, 1)
            write_json(folder / "point.json", record)
        values = last_values(folder / "metrics.csv")
        if "error" not in record and self.metric not in values:
            known = ", ".join(sorted(set(values) - {"step", "epoch"}))
            raise self._wrong("metric.name", f"is {self.metric!r}, which no run logs; they log {known}")
        value = values.get(self.metric, math.nan)
        record["metric"] = value if math.isfinite(value) and "error" not in record else None
        if "error" not in record:
            record["inputs"] = {}
            with contextlib.suppress(ValueError):  # without a configuration there are no files to record
                record["inputs"] = inputs(load_yaml(folder / "config.yaml"), f"{self.out}/")
            sync_tree(folder)
            write_json(folder / DONE, record)
        return record

    def _result(self, records: list[dict[str, Any]]) -> dict[str, Any]:
        """Content of sweep.json: all points so far, the best first."""
        sign = -1.0 if self.goal == "maximize" else 1.0
        ranked = sorted(records, key=lambda r: math.inf if r["metric"] is None else sign * r["metric"])
        keys = ("folder", "parameters", "metric", "seconds", "error")
        return {
            "name": self.name,
            "file": str(self.file),
            "method": self.method,
            "metric": self.metric,
            "goal": self.goal,
            "names": short_names(self.parameters),
            "points": [secret.redacted({key: record[key] for key in keys if key in record}) for record in ranked],
        }

    def describe(self, point: Point) -> str:
        """Swept values of a point, by short names."""
        names = short_names(self.parameters)
        return " ".join(f"{names[key]}={value}" for key, value in secret.redacted(point.parameters).items())


def table(result: Mapping[str, Any]) -> str:
    """Format the points of a sweep as text, the best first."""
    names = result["names"]
    rows = [["run", *names.values(), result["metric"], "seconds"]]
    for point in result["points"]:
        told = [str(point["parameters"][key]) for key in names]
        metric = "failed" if "error" in point else _number(point["metric"])
        rows.append([point["folder"], *told, metric, f"{point['seconds']:.0f}"])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def short_names(keys: Mapping[str, Any]) -> dict[str, str]:
    """Shorten each key to the shortest ending that is unique."""
    paths = {key: [part for part in key.split(".") if part != "init_args"] for key in keys}

    def ending(key: str, length: int) -> str:
        return ".".join(paths[key][-length:])

    short = {}
    for key, path in paths.items():
        others = [other for other in paths if other != key]
        lengths = (n for n in range(1, len(path)) if ending(key, n) not in {ending(other, n) for other in others})
        short[key] = ending(key, next(lengths, len(path)))
    return short


def _args(parameters: Mapping[str, Any]) -> list[str]:
    """Format parameters as W&B's agent fills in `${args}`."""
    return [f"--{key}={value}" for key, value in parameters.items()]


def _draw(random: Random, told: Mapping[str, Any]) -> Any:
    if "values" in told:
        return random.choices(told["values"], told["weights"])[0]
    kind = told["distribution"]
    value = _DRAW[kind.removeprefix("q_")](random, told)
    if kind.startswith("q_"):
        value = round(value / told.get("q", 1)) * told.get("q", 1)
    return value if isinstance(value, int) else float(f"{value:.6g}")


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.5g}"
