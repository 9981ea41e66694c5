"""Run stages in order. Stages pass artefacts on as folders, and an interrupted pipeline resumes where it stopped.

A pipeline file lists stages, each with the YAML that it runs. Every stage can also be run alone by hand:

    root: runs/sandbox
    stages:
      pretrain: {fit: pretrain.yaml}
      samples: {predict: samples.yaml}
      comparisons: {call: comparisons.yaml}

`fit` and `predict` are the commands of that name; `call` instantiates a class and calls its `run(out: Path)`.
Repeated stages form a loop: see `rounds.py`.

Stages find each other's artefacts by paths that begin with the root. With another output folder, these paths are
rewritten. `seed` is added to every key named `seed` or `seed_everything`.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import yaml

from lit_align.callbacks.manifest import environment
from lit_align.callbacks.metrics_csv import last_values
from lit_align.pipeline.rounds import Slot, unroll
from lit_align.pipeline.stage_files import check, inputs, outputs
from lit_align.utils import claim, display, limits, secret
from lit_align.utils.disk import sync_tree, write_whole
from lit_align.utils.names import check_folder, check_name
from lit_align.utils.owned import check_output

KINDS = ("fit", "predict", "call")
DONE = "done.json"
# Reserved names: entries beside the folders of the stages.
TAKEN = ("replaced", "summary.json", "manifest.json", "sweep.json", "report.html")


class Step(Protocol):
    """Protocol of the classes that a `call` stage names by class_path."""

    def run(self, out: Path) -> dict[str, float]:
        """Write artefacts into the folder `out`; return figures for the summary."""
        ...


@dataclass
class Stage:
    """One stage, resolved.

    Attributes:
        name: name of the stage and of its folder.
        kind: fit, predict or call.
        config: content of its YAML with seed and overrides applied. Paths still begin with the root.
        parents: stages whose folders the configuration names.
        file: the YAML file.
        round: round of its loop, from 1.
    """

    name: str
    kind: str
    config: dict[str, Any]
    parents: list[str]
    file: Path = Path()
    round: int = 1


# Runs a stage of kind fit or predict: kind, path of the YAML, further arguments.
RunCommand = Callable[[str, Path, list[str]], None]
RunStep = Callable[[Path, Path], dict[str, float]]


class Pipeline:
    """A pipeline file, resolved for one output folder and seed.

    Args:
        file: the pipeline's YAML.
        out: output folder; null takes the root named in the file.
        seed: added to every seed of the stages.
        quick: apply the file's `quick` overrides, which shrink the pipeline to a trial.
        overrides: "stage.dotted.key": value; these win over everything else.

    Raises:
        ValueError: a key is missing, unknown or wrong; names the key.
    """

    def __init__(
        self,
        file: str | Path,
        out: str | Path | None = None,
        seed: int = 0,
        quick: bool = False,
        overrides: Mapping[str, Any] | None = None,
    ) -> None:
        self.file = Path(file)
        content = load_yaml(self.file)
        unknown = set(content) - {"root", "stages", "quick"}
        fits = isinstance(content.get("root"), str) and isinstance(content.get("stages"), dict)
        if unknown or not fits:
            problem = (
                f"unknown key {min(unknown)!r}" if unknown else "root (a folder) and stages (a mapping) are needed"
            )
            raise ValueError(f"{self.file}: {problem}; a pipeline has root, stages and, if you like, quick")
        shrunken = content.get("quick") or {}
        if not isinstance(shrunken, dict) or not all(isinstance(keys, dict) for keys in shrunken.values()):
            raise ValueError(f"{self.file}: quick must be a mapping of stages to dotted keys and their values")
        self.root = check_folder(content["root"], f"{self.file}: root").rstrip("/")
        self.out = Path(out) if out is not None else Path(self.root)
        self.seed = seed
        self.overrides = dict(overrides or {})
        if quick:
            self.overrides = {**_flat(shrunken), **self.overrides}
        try:
            slots = unroll(content["stages"])
            for slot in slots:
                check_name(slot.name, "the stage", TAKEN)
        except ValueError as error:
            raise ValueError(f"{self.file}: {error}") from error
        for key in self.overrides:
            if not any(list(slot.overrides({key: None})) for slot in slots):
                stages = ", ".join(dict.fromkeys(f"{slot.loop}.{slot.inner}".strip(".") or slot.name for slot in slots))
                raise ValueError(f"{self.file}: {key!r} overrides no key of a stage; stages are {stages}")
        self.stages = [self._resolve(slot) for slot in slots]
        self._check_order()

    def _resolve(self, slot: Slot) -> Stage:
        name, told = slot.name, slot.told
        given = list(told.items()) if isinstance(told, dict) else []
        if len(given) != 1 or given[0][0] not in KINDS or not isinstance(given[0][1], str):
            raise ValueError(
                f"{self.file}: stage {name!r} must be one of {', '.join(KINDS)} with the name of a YAML file"
            )
        ((kind, file),) = given
        config = slot.own(load_yaml(self.file.parent / file), self.root)
        for dotted, value in slot.again.items():
            _set(config, dotted, value, f"{self.file}: again of loop {slot.loop!r}, '{slot.inner}.{dotted}'")
        if kind == "call":
            config.setdefault("init_args", {})
        else:
            config["out"] = f"{self.root}/{name}"
        parents: set[str] = set()
        config = self._fill(config, parents)
        for key, dotted, value in slot.overrides(self.overrides):
            if kind != "call" and dotted.partition(".")[0] == "out":
                raise ValueError(f"{self.file}: override {key!r}: a stage writes into its own folder; give --out")
            _set(config, dotted, self._fill(value, parents), f"{self.file}: override {key!r}")
        return Stage(name, kind, config, sorted(parents - {name}), self.file.parent / file, slot.round)

    def _check_order(self) -> None:
        """Refuse a stage that uses artefacts of a later stage: they would exist only in the second run."""
        names = [stage.name for stage in self.stages]
        for number, stage in enumerate(self.stages):
            if late := [parent for parent in stage.parents if parent in names[number:]]:
                raise ValueError(f"{self.file}: stage {stage.name!r} uses {late[0]!r}, which comes after it")

    def _fill(self, value: Any, parents: set[str]) -> Any:
        """Add the seed to all seeds, and collect the stages that paths name into `parents`."""
        if isinstance(value, dict):
            return {
                key: item + self.seed
                if key in ("seed", "seed_everything") and isinstance(item, int) and not isinstance(item, bool)
                else self._fill(item, parents)
                for key, item in value.items()
            }
        if isinstance(value, list):
            return [self._fill(item, parents) for item in value]
        if isinstance(value, str) and value.startswith(f"{self.root}/"):
            inside = value[len(self.root) + 1 :].split("/")
            if ".." in inside:
                raise ValueError(f"{self.file}: {value!r} leads out of a stage's folder: take `..` out of it")
            parents.add(inside[0])
        return value

    def moved(self, value: Any) -> Any:
        """Rewrite paths that begin with the root to begin with the output folder."""
        if isinstance(value, dict):
            return {key: self.moved(item) for key, item in value.items()}
        if isinstance(value, list):
            return [self.moved(item) for item in value]
        if isinstance(value, str) and value.startswith(f"{self.root}/"):
            return str(self.out / value[len(self.root) + 1 :])
        return value

    def run(
        self,
        command: RunCommand,
        step: RunStep,
        say: Callable[[str], None] = display.say,
        allow: frozenset[str] = frozenset(),
    ) -> dict[str, float]:
        """Run all stages that are not done yet; write `summary.json` and return its content.

        A stage counts as done if its configuration and those of its parents are unchanged. If a configuration has
        changed, the old folder is set aside and the stage runs again. An interrupted stage resumes from its last
        checkpoint. The files that a finished stage read and wrote must be unchanged; before a later stage reads them,
        they are compared by checksum.

        Args:
            command: runs a stage of kind fit or predict.
            step: runs a stage of kind call.
            say: prints a line.
            allow: accepted kinds of change, as in `--resume.allow`.

        Raises:
            ValueError: files of a finished stage are gone or have changed.
            InUseError: another run holds the output folder.
            FileExistsError: the output folder holds files of the user under names that will be written.
        """
        with claim.held(self.out, say):
            self._check_out()
            return self._run(command, step, say, allow)

    def _check_out(self) -> None:
        """Refuse an output folder in which stages or the summary would overwrite files that lit_align did not write.

        Raises:
            FileExistsError: names the file or the folder, and the way out.
        """
        if claim.other_rank():
            return
        check_output(self.out, ("summary.json", "manifest.json"), [stage.name for stage in self.stages])
        if not (self.out / "manifest.json").exists():  # marks the folder as ours from the start
            write_whole(self.out / "manifest.json", json.dumps(self._manifest({}), indent=2) + "\n")

    def _run(
        self, command: RunCommand, step: RunStep, say: Callable[[str], None], allow: frozenset[str]
    ) -> dict[str, float]:
        started = time.monotonic()
        keys: dict[str, str] = {}
        for number, stage in enumerate(self.stages, start=1):
            keys[stage.name] = key = self._key(stage, keys)
            folder = self.out / stage.name
            done = read_json(folder / DONE)
            heading = f"[{number}/{len(self.stages)}] {stage.name}"
            if done.get("key") == key:
                self._check_done(stage, allow, say)
                say(f"{heading}: done before, in {done['seconds']:.0f} s")
                continue
            if done or ((folder / "stage.json").exists() and read_json(folder / "stage.json").get("key") != key):
                aside = set_aside(folder)
                say(f"{heading}: its configuration has changed; the earlier one is kept in {aside}")
            for parent in (earlier for earlier in self.stages if earlier.name in stage.parents):
                self._check_done(parent, allow, say, thorough=True)
            say(f"{heading} ...")
            self._run_stage(stage, folder, key, command, step, allow)
            done = read_json(folder / DONE)
            say(f"{heading}: {done['seconds']:.0f} s")
        summary = self.summary()
        summary["seconds"] = round(sum(v for k, v in summary.items() if k.endswith("/seconds")), 1)
        summary["seconds_this_time"] = round(time.monotonic() - started, 1)
        write_whole(self.out / "summary.json", json.dumps(summary, indent=2) + "\n")
        write_whole(self.out / "manifest.json", json.dumps(self._manifest(keys), indent=2) + "\n")
        return summary

    def _check_done(
        self, stage: Stage, allow: frozenset[str], say: Callable[[str], None], thorough: bool = False
    ) -> None:
        """Compare the files that a finished stage read and wrote with those recorded then.

        Args:
            stage: the finished stage.
            allow: accepted kinds of change.
            say: prints a line.
            thorough: compare outputs by checksum, not only by size and time.

        Raises:
            ValueError: a file has changed or is gone.
        """
        folder = self.out / stage.name
        done = read_json(folder / DONE)
        what, again = f"stage {stage.name!r}", f"remove {folder / DONE} to run the stage again"
        accepted: dict[str, Any] = {}
        for part, where in (("outputs", folder), ("inputs", Path())):
            known = done.get(part) or {}
            new = check(what, where, known, allow, say, again, thorough and part == "outputs")
            accepted |= {part: {**known, **new}} if new else {}
        if accepted:
            write_json(folder / DONE, {**done, **accepted})

    def _run_stage(
        self, stage: Stage, folder: Path, key: str, command: RunCommand, step: RunStep, allow: frozenset[str]
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        before = read_json(folder / "stage.json").get("seconds", 0.0)
        write_json(folder / "stage.json", {"key": key, "seconds": before})
        started = time.monotonic()
        secret.warn_of(stage.config, f"{stage.name}.")
        try:
            with secret.without(folder / "stage.yaml", self.moved(stage.config)) as file:
                figures = self._ran(stage, folder, file, command, step, allow)
        finally:
            # The time of interrupted attempts counts too.
            seconds = before + time.monotonic() - started
            write_json(folder / "stage.json", {"key": key, "seconds": seconds})
        files = {"outputs": outputs(stage.kind, folder), "inputs": inputs(stage.config, f"{self.root}/")}
        sync_tree(folder)
        write_json(folder / DONE, {"key": key, "seconds": round(seconds, 1), "figures": figures, **files})

    def _ran(
        self, stage: Stage, folder: Path, file: Path, command: RunCommand, step: RunStep, allow: frozenset[str]
    ) -> dict[str, float]:
        """Run the file of a stage; return the figures of a call, or none."""
        if stage.kind == "call":
            return step(file, folder)
        # After a kill, last.ckpt may be missing or a broken link; `--ckpt_path last` finds the newest checkpoint.
        resumes = stage.kind == "fit" and any((folder / "checkpoints").glob("*.ckpt"))
        if stage.kind == "fit" and not resumes:
            # Files of an attempt without a checkpoint are useless, and would push the run to another folder name.
            (folder / "config.yaml").unlink(missing_ok=True)
            (folder / "metrics.csv").unlink(missing_ok=True)
        accept = [f"--resume.allow=[{','.join(sorted(allow))}]"] if allow else []
        last = ["--ckpt_path", "last", *accept]
        command(stage.kind, file, last if resumes else [])
        return {}

    def summary(self) -> dict[str, float]:
        """Figures of all stages: return values of calls, last validation metrics of fits, and seconds."""
        summary: dict[str, float] = {}
        for stage in self.stages:
            folder = self.out / stage.name
            done = read_json(folder / DONE)
            if not done:
                continue
            summary |= {name if "/" in name else f"{stage.name}/{name}": v for name, v in done["figures"].items()}
            if stage.kind == "fit":
                summary |= {f"{stage.name}/{name}": v for name, v in last_validation(folder / "metrics.csv").items()}
            summary[f"{stage.name}/seconds"] = done["seconds"]
        return summary

    def _key(self, stage: Stage, keys: Mapping[str, str]) -> str:
        """Hash of the configurations of a stage and its parents; independent of the output folder."""
        text = json.dumps(stage.config, sort_keys=True)
        parents = [keys[parent] for parent in stage.parents if parent in keys]
        return hashlib.sha256(json.dumps([stage.kind, text, parents]).encode()).hexdigest()[:16]

    def _manifest(self, keys: Mapping[str, str]) -> dict[str, Any]:
        stages = {stage.name: {"key": keys.get(stage.name), "parents": stage.parents} for stage in self.stages}
        return {**environment(), "pipeline": str(self.file), "seed": self.seed, "stages": stages}


def last_validation(metrics: Path) -> dict[str, float]:
    """Last value of each validation metric of a run, named without `val/`."""
    return {name[4:]: value for name, value in last_values(metrics).items() if name.startswith("val/")}


def load_yaml(file: Path) -> dict[str, Any]:
    """Read a YAML file that holds a mapping.

    Raises:
        ValueError: the file cannot be read or holds something else; names the file.
    """
    try:
        content = limits.load_yaml(limits.read_text(file), file)
    except (OSError, yaml.YAMLError) as error:
        reason = str(error).replace("\n", " ")
        raise ValueError(f"cannot read {file}: {reason}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds {type(content).__name__}, expected a mapping")
    for line in limits.no_files(content):
        raise ValueError(f"{file}: {line}")
    return content


def _flat(nested: Mapping[str, Any]) -> dict[str, Any]:
    """Flatten stages with dotted keys to "stage.dotted.key"."""
    return {f"{stage}.{key}": value for stage, keys in nested.items() for key, value in keys.items()}


def _set(config: dict[str, Any], dotted: str, value: Any, what: str) -> None:
    def place(here: Any, part: str) -> Any:
        """Key of a mapping or index of a list."""
        if isinstance(here, list) and not (part.isdigit() and int(part) < len(here)):
            raise ValueError(f"{what}: {part!r} is not an index of a list of {len(here)}")
        return int(part) if isinstance(here, list) else part

    *path, last = dotted.split(".")
    here: Any = config
    for part in path:
        at = place(here, part)
        here = here[at] if isinstance(here, list) else here.setdefault(at, {})
        if not isinstance(here, (dict, list)):
            raise ValueError(f"{what} goes through {part!r}, which is not a mapping")
    here[place(here, last)] = value


def read_json(path: Path) -> dict[str, Any]:
    """Read what `write_json` wrote; empty if the file does not exist.

    Raises:
        ValueError: the file is damaged; names the file.
    """
    if not path.exists():
        return {}
    try:
        return dict(json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{path} is damaged ({error}): remove it, and the stage or point that it belongs to runs again"
        ) from error


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON atomically."""
    write_whole(path, json.dumps(content))


def set_aside(folder: Path) -> Path:
    """Move a folder to a free name in the folder `replaced` beside it; return the new path."""

    def free() -> Iterator[Path]:
        number = 1
        while True:
            yield folder.parent / "replaced" / f"{folder.name}-{number}"
            number += 1

    aside = next(path for path in free() if not path.exists())
    aside.parent.mkdir(exist_ok=True)
    folder.rename(aside)
    return aside
