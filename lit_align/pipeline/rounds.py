"""Loops of a pipeline: the same stages in several rounds, each round building on the artefacts of the one before.

    stages:
      sft: {fit: sft.yaml}
      raft:
        rounds: 3
        stages: {samples: {predict: raft_samples.yaml}, best: {call: raft_best.yaml}, train: {fit: raft_train.yaml}}
        again:
          samples.model.init_args.network.name: runs/sandbox/raft_{before}_train/model
          train.model.init_args.network.name: runs/sandbox/raft_{before}_train/model

expands to the stages sft, raft_1_samples, raft_1_best, raft_1_train, raft_2_samples, ... raft_3_train. They behave like
any other stage. The files describe round 1, and can be run by hand as such. In round 3, a path
`runs/sandbox/raft_1_best` in a file becomes `raft_3_best`. The keys of `again` are set in every round but the first,
with {round} and {before} replaced by numbers.

On the command line, `--set raft.train.trainer.max_epochs=1` sets a key in every round, `--set raft_2_train....` in one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from lit_align.utils.names import check_name

MAX_ROUNDS = 1_000


@dataclass
class Slot:
    """A stage in the order of the pipeline, before its file is read.

    Attributes:
        name: name of the stage.
        told: its kind and file, as the pipeline file gives them.
        loop: name of its loop; empty outside of a loop.
        inner: its name inside the loop.
        round: number of the round, from 1.
        again: dotted keys of this stage that this round sets, with their values.
    """

    name: str
    told: Any
    loop: str = ""
    inner: str = ""
    round: int = 1
    again: dict[str, Any] = field(default_factory=dict)

    def own(self, config: Any, root: str) -> Any:
        """Rewrite the folders of the loop in a configuration from round 1 to this round."""
        if self.round == 1:
            return config
        if isinstance(config, dict):
            return {key: self.own(item, root) for key, item in config.items()}
        if isinstance(config, list):
            return [self.own(item, root) for item in config]
        first = f"{root}/{self.loop}_1_"
        if isinstance(config, str) and config.startswith(first):
            return f"{root}/{self.loop}_{self.round}_{config.removeprefix(first)}"
        return config

    def overrides(self, given: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
        """Yield (key, dotted key, value) of the overrides of this stage: first those of all rounds, then its own."""
        for prefix in (f"{self.loop}.{self.inner}.", f"{self.name}."):
            for key, value in given.items():
                if key.startswith(prefix) and len(key) > len(prefix):
                    yield key, key.removeprefix(prefix), value


def unroll(stages: Mapping[str, Any]) -> list[Slot]:
    """Expand loops into stages, round by round.

    Raises:
        ValueError: a malformed loop, an invalid stage name, or two stages of one name; names it.
    """
    slots: list[Slot] = []
    for name, told in stages.items():
        check_name(name, "the stage")
        if not (isinstance(told, dict) and "rounds" in told):
            slots.append(Slot(name, told))
            continue
        inside, again = _checked(name, told)
        for number in range(1, told["rounds"] + 1):
            for inner, of_stage in inside.items():
                check_name(inner, f"loop {name!r}: the stage")
                mine = {key.removeprefix(f"{inner}."): value for key, value in again.items() if _of(key) == inner}
                later = _numbered(mine, number) if number > 1 else {}
                slots.append(Slot(f"{name}_{number}_{inner}", of_stage, name, inner, number, later))
    names = [slot.name for slot in slots]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"two stages are called {twice[0]!r}")
    return slots


def _checked(name: str, told: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Check a loop; return its stages and its `again` keys."""
    if unknown := set(told) - {"rounds", "stages", "again"}:
        raise ValueError(f"loop {name!r} has an unknown key {min(unknown)!r}; it has rounds, stages and again")
    rounds, stages, again = told["rounds"], told.get("stages"), told.get("again") or {}
    if not isinstance(rounds, int) or isinstance(rounds, bool) or not 1 <= rounds <= MAX_ROUNDS:
        raise ValueError(f"loop {name!r} has {rounds!r} rounds, expected a number from 1 to {MAX_ROUNDS:,}")
    if not isinstance(stages, dict) or not stages:
        raise ValueError(f"loop {name!r} needs stages (a mapping)")
    if not isinstance(again, dict):
        raise ValueError(f"loop {name!r}: again must be a mapping of stage.dotted.key to values")
    for key in again:
        if _of(key) not in stages or not key.partition(".")[2]:
            raise ValueError(f"loop {name!r}: again.{key} is not a key of a stage; stages are {', '.join(stages)}")
    return stages, again


def _of(key: str) -> str:
    return str(key).partition(".")[0]


def _numbered(value: Any, number: int) -> Any:
    """Fill in {round} and {before}: as a number if the value is nothing else, else as digits in the text."""
    if isinstance(value, dict):
        return {key: _numbered(item, number) for key, item in value.items()}
    if isinstance(value, list):
        return [_numbered(item, number) for item in value]
    if not isinstance(value, str):
        return value
    if value in ("{round}", "{before}"):
        return number - (value == "{before}")
    return value.replace("{round}", str(number)).replace("{before}", str(number - 1))
