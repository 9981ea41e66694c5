"""Loops of a pipeline: the same stages round after round, each round on what the one before has left.

    stages:
      sft: {fit: sft.yaml}
      raft:
        rounds: 3
        stages: {samples: {predict: raft_samples.yaml}, best: {call: raft_best.yaml}, train: {fit: raft_train.yaml}}
        again:
          samples.model.init_args.network.name: runs/sandbox/raft_{before}_train/model
          train.model.init_args.network.name: runs/sandbox/raft_{before}_train/model

are the stages sft, raft_1_samples, raft_1_best, raft_1_train, raft_2_samples, ... raft_3_train, as ordinary as others.
The files say what round 1 does, and run by hand as that. In round 3, what they say of `runs/sandbox/raft_1_best` is of
`raft_3_best`; and `again` is put over them in every round but the first, with numbers for {round} and {before}.

On the command line `--set raft.train.trainer.max_epochs=1` is of every round, `--set raft_2_train....` of one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from lit_align.utils.names import check_name

MAX_ROUNDS = 1_000


@dataclass
class Slot:
    """A place in the order of stages, before its file is read.

    Attributes:
        name: of the stage.
        told: its kind and file, as the pipeline has them.
        loop: name of the loop it is in; empty outside of one.
        inner: its name in the loop.
        round: which round, from 1.
        again: dotted keys of this stage and their values in this round.
    """

    name: str
    told: Any
    loop: str = ""
    inner: str = ""
    round: int = 1
    again: dict[str, Any] = field(default_factory=dict)

    def own(self, config: Any, root: str) -> Any:
        """The configuration of round 1 with its loop's folders as they are called in this round."""
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
        """Those that are of this stage (key, dotted key, value): of the loop's stage in every round, then its own."""
        for prefix in (f"{self.loop}.{self.inner}.", f"{self.name}."):
            for key, value in given.items():
                if key.startswith(prefix) and len(key) > len(prefix):
                    yield key, key.removeprefix(prefix), value


def unroll(stages: Mapping[str, Any]) -> list[Slot]:
    """Every stage in its order, those of loops round after round.

    Raises:
        ValueError: a loop that is none, a name that is no folder's, or two stages of one name; names it.
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
    """Stages of a loop, and what it says of later rounds."""
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
            raise ValueError(f"loop {name!r}: again.{key} is no key of a stage; stages are {', '.join(stages)}")
    return stages, again


def _of(key: str) -> str:
    return str(key).partition(".")[0]


def _numbered(value: Any, number: int) -> Any:
    """{round} and {before} filled in; alone they are numbers, and within a text its digits."""
    if isinstance(value, dict):
        return {key: _numbered(item, number) for key, item in value.items()}
    if isinstance(value, list):
        return [_numbered(item, number) for item in value]
    if not isinstance(value, str):
        return value
    if value in ("{round}", "{before}"):
        return number - (value == "{before}")
    return value.replace("{round}", str(number)).replace("{before}", str(number - 1))
