"""What must be equal, bit by bit, when a run that was broken off has come to its end; and the table."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file

from lit_align.callbacks import AtomicCheckpointIO
from lit_align.callbacks.throughput import TIMED

# Of a checkpoint: all but its callbacks' paths, and the run's configuration, which holds its folder.
STATE = ("state_dict", "optimizer_states", "lr_schedulers", "rng", "global_step", "epoch", "loops")
DATA = ("InstructionDataModule", "PreferenceDataModule", "PromptDataModule")


def identical(one: Any, other: Any) -> bool:
    """Equal bit by bit, at any depth."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(identical(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(identical, one, other))
    return type(one) is type(other) and bool(one == other)


def _content(file: Path, out: Path) -> bytes:
    """What is in a file; of metrics.csv, without what a clock decides; without a model card's title, the run's name."""
    if file.name == "metrics.csv":
        rows = list(csv.reader(file.read_text().splitlines()))
        kept = [i for i, name in enumerate(rows[0]) if name not in TIMED]
        return json.dumps([[row[i] for i in kept] for row in rows]).encode()
    return file.read_bytes().replace(f"# {out.name}\n".encode(), b"", 1 if file.name == "README.md" else 0)


def differences(whole: Path, broken: Path) -> list[str]:
    """How what the two runs left differs."""
    found = []
    names = [sorted(str(path.relative_to(out)) for path in out.rglob("*")) for out in (whole, broken)]
    if names[0] != names[1]:
        found.append(f"files: missing {set(names[0]) - set(names[1])}, left over {set(names[1]) - set(names[0])}")
    for name in names[0]:
        if name == "metrics.csv" or name.startswith("model/"):
            one, other = whole / name, broken / name
            if one.is_file() and (not other.exists() or _content(one, whole) != _content(other, broken)):
                found.append(f"{name} differs")
    states = [AtomicCheckpointIO().load_checkpoint(out / "checkpoints" / "last.ckpt") for out in (whole, broken)]
    for state in states:
        # Two counts of Lightning's differ and lead to nothing: how many batches validation has had, and how many epochs
        # were begun, which does not count one that begins with a resumed run.
        loop = {name: value for name, value in state["loops"]["fit_loop"].items() if "val_loop" not in name}
        loop["epoch_progress"] = {part: told["completed"] for part, told in loop["epoch_progress"].items()}
        state["loops"]["fit_loop"] = loop
    for key in (*STATE, *DATA):
        if not identical(states[0].get(key), states[1].get(key)):
            found.append(f"{key} of the last checkpoint differs")
    return found


def damage(out: Path, step: int) -> tuple[list[str], int]:
    """What a killed run has lost or torn, when its last checkpoint was of `step` before; and of which it is now."""
    found, last = [], out / "checkpoints" / "last.ckpt"
    for path in out.glob("checkpoints/*.ckpt"):
        try:
            AtomicCheckpointIO().load_checkpoint(path)
        except Exception as error:  # whatever it is, it is damage
            found.append(f"{path.name}: {error}")
    if not last.exists():
        if step or last.is_symlink():
            found.append(f"last.ckpt of step {step} is lost")
    elif not found:
        now = AtomicCheckpointIO().load_checkpoint(last)["global_step"]
        if now < step:
            found.append(f"last.ckpt went back from step {step} to {now}")
        step = now
    readers = {"config.yaml": yaml.safe_load, "manifest.json": json.loads}
    for name, read in readers.items():
        try:
            if (out / name).exists() and not isinstance(read((out / name).read_text()), dict):
                found.append(f"{name} is torn")
        except ValueError as error:
            found.append(f"{name}: {error}")
    if (out / "model").exists():
        load_file(out / "model" / "model.safetensors")
    if (out / "metrics.csv").exists():
        text = (out / "metrics.csv").read_text()
        rows = list(csv.DictReader(text.splitlines()[: text.count("\n")]))
        steps = [int(row["step"]) for row in rows]
        if steps != sorted(steps) or (step and not rows):
            found.append(f"metrics.csv: steps {steps}")
    return found, step


def table(result: dict[str, Any]) -> str:
    """Markdown."""
    lines = []
    if "modules" in result:
        lines += [
            "| module | runs | kills: any time | in training | before a file operation | in the 10 ms after one | "
            "differ after resume | files lost or torn |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for method, count in result["modules"].items():
            kills = [str(count["kills"].get(kind, 0)) for kind in ("clock", "training", "file", "file+")]
            wrong = [str(len(count[key])) for key in ("differ", "lost_or_torn")]
            lines.append(f"| {method} | {count['runs']} | {' | '.join(kills)} | {' | '.join(wrong)} |")
        lines += ["", f"{result['kills']} kills in all.", ""]
    if "faults" in result:
        lines += ["| fault | what happened | as expected |", "|---|---|---|"]
    for fault in result.get("faults", []):
        told = " ".join(fault["told"].split()).replace("|", "\\|")
        lines.append(f"| {fault['fault']} | {told} | {'yes' if fault['as_expected'] else '**no**'} |")
    return "\n".join(lines) + "\n"
