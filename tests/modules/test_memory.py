"""What is said of memory before training, after it, and when there is not enough."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import logging
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer
from support.runs import build, write_rows
from support.tiny import tiny_folder
from torch import nn

from lit_align import DPOModule, Lora, Network
from lit_align.__main__ import entry
from lit_align.modules import memory
from lit_align.modules.memory import (
    MIB,
    OutOfMemory,
    RoleMemory,
    memory_budget,
    memory_for,
    peak_memory,
    state_numbers,
)


def quick_trainer(**options: Any) -> Trainer:
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Trainer(accelerator="cpu", precision="64-true", limit_val_batches=0, **quiet, **options)


class Roles(nn.Module):
    """Ten weights that are trained, five that are not, and two of a head on the first."""

    def __init__(self) -> None:
        super().__init__()
        self.policy = nn.Linear(10, 1, bias=False)
        self.reference = nn.Linear(5, 1, bias=False).half().requires_grad_(False)
        self.value = nn.ModuleList([self.policy, nn.Linear(2, 1, bias=False)])
        self.nothing = nn.Identity()


# Kills: shared weights counted twice; gradients of frozen weights, or twice those in slices; bytes of fp32 assumed;
# state of SGD.
def test_budget_by_hand() -> None:
    module = Roles()
    trained = [p for p in module.parameters() if p.requires_grad]
    adam, sgd = torch.optim.AdamW(trained), torch.optim.SGD(trained, lr=0.1)
    assert memory_budget(module, [adam]) == [
        RoleMemory("policy", 10, 10, 40, 120),
        RoleMemory("reference", 5, 0, 10, 0),
        RoleMemory("value", 2, 2, 8, 24),
    ]
    assert [role.training for role in memory_budget(module, [sgd])] == [40, 0, 8]
    slices = torch.optim.AdamW([nn.Parameter(torch.ones(6))])  # half of the weights, as ZeRO steps on
    assert memory_budget(module, [slices])[2:] == [
        RoleMemory("value", 2, 2, 8, 8),
        RoleMemory("optimizer's slices", 6, 6, 24, 72),
    ]
    assert memory_budget(module, [slices], gradients_in_slices=True)[2:] == [
        RoleMemory("value", 2, 2, 8, 0),
        RoleMemory("optimizer's slices", 6, 6, 24, 72),
    ]


# Kills: 0 for what is not Adam; momentum, amsgrad or centered forgotten.
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (torch.optim.Adam, {"amsgrad": True}),
        (torch.optim.NAdam, {}),
        (torch.optim.Adamax, {}),
        (torch.optim.RMSprop, {}),
        (torch.optim.RMSprop, {"momentum": 0.9, "centered": True}),
        (torch.optim.Adagrad, {}),
        (torch.optim.Adadelta, {}),
        (torch.optim.Rprop, {}),
        (torch.optim.ASGD, {}),
        (torch.optim.SGD, {}),
        (torch.optim.SGD, {"momentum": 0.9}),
        (torch.optim.Adafactor, {}),
    ],
)
def test_state_is_what_the_optimizer_holds_after_a_step(kind: Any, options: dict[str, Any]) -> None:
    weight = nn.Parameter(torch.ones(100, 100))
    optimizer = kind([weight], lr=0.1, **options)
    weight.square().sum().backward()
    optimizer.step()
    held = [x for x in optimizer.state[weight].values() if isinstance(x, torch.Tensor) and x.numel() == weight.numel()]
    assert state_numbers(optimizer, optimizer.param_groups[0]) == len(held)


def test_budget_in_words() -> None:
    assert str(RoleMemory("policy", 2_000_000, 1_000_000, 8 * MIB, 12 * MIB)) == (
        "policy 2.00 M parameters, 8 MiB + 12 for training 1.00 M"
    )
    assert str(RoleMemory("reference", 2_000_000, 0, 8 * MIB, 0)) == "reference 2.00 M parameters, 8 MiB, frozen"


def test_peak_grows_with_what_is_held() -> None:
    before = peak_memory(torch.device("cpu"))
    held = torch.ones(before // 4 + 50 * MIB)  # four bytes each: more than all that was ever held
    assert peak_memory(torch.device("cpu")) - before > 50 * MIB
    del held


def test_windows_has_neither_of_two_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setitem(sys.modules, "resource", None)  # its import fails
    monkeypatch.setattr(ctypes, "CDLL", None)
    spec = importlib.util.spec_from_file_location("memory_of_windows", memory.__file__)
    elsewhere = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(elsewhere)
    assert elsewhere.peak_memory(torch.device("cpu")) == 0
    assert not elsewhere.keep_freed_memory()


def too_much() -> None:
    torch.empty(2**50)


class FailsInBackward(torch.autograd.Function):
    """The identity, of which the gradient does not fit."""

    @staticmethod
    def forward(ctx, x):  # type: ignore[no-untyped-def]
        return x.clone()

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        too_much()


@pytest.mark.parametrize("phase", ["forward", "backward"])
@pytest.mark.parametrize("micro_batch_tokens", [None, 100])
def test_not_enough_names_phase_work_and_option(phase: str, micro_batch_tokens: int | None, tmp_path: Path) -> None:
    write_rows(tmp_path)
    tiny_folder(tmp_path / "policy")
    module, data = build("sft", str(tmp_path / "policy"), tmp_path, micro_batch_tokens=micro_batch_tokens)
    step = module.micro_step
    module.micro_step = (lambda batch: too_much()) if phase == "forward" else lambda b: FailsInBackward.apply(step(b))
    says = rf"out of memory in the {phase} of a micro-batch of [\d,]+ tokens in \d+ rows: lower data.micro_batch_tokens"
    with pytest.raises(OutOfMemory, match=says):
        quick_trainer(max_steps=1).fit(module, data)


def test_ppo_names_its_own_options(tmp_path: Path) -> None:
    write_rows(tmp_path)
    tiny_folder(tmp_path / "policy")
    tiny_folder(tmp_path / "reference", seed=1)
    module, data = build("ppo", str(tmp_path / "policy"), tmp_path)
    says = r"out of memory in the backward of a micro-batch of \d+ tokens in \d rows: lower model\.micro_batch_size or"
    values_of = module.values

    def fails_in_backward(*call: Any) -> Any:
        values = values_of(*call)
        return FailsInBackward.apply(values) if values.requires_grad else values

    module.values = fails_in_backward
    with pytest.raises(OutOfMemory, match=says):
        quick_trainer(max_steps=1).fit(module, data)
    module, data = build("ppo", str(tmp_path / "policy"), tmp_path)
    module.engine = lambda *call: too_much()
    with pytest.raises(OutOfMemory, match=r"in a rollout of 16 answers at once: lower model\.sampling\.batch_size"):
        quick_trainer(max_steps=1).fit(module, data)


def test_other_errors_pass_through() -> None:
    for error in (RuntimeError("shapes differ"), KeyError("x")):
        with pytest.raises(type(error), match=str(error.args[0])), memory_for("the rollout", "samples"):
            raise error
    inner = OutOfMemory("first")
    with pytest.raises(OutOfMemory, match=r"^first$"), memory_for("the rollout", "samples"):
        raise inner


def test_the_program_ends_in_a_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> None:
        with memory_for("the rollout of 4 answers", "model.sampling.batch_size"):
            too_much()

    monkeypatch.setattr("lit_align.cli.entry.main", main)
    assert entry() == 1
    told = capsys.readouterr().err
    assert told.startswith("lit-align: out of memory in the rollout of 4 answers: lower model.sampling.batch_size (")
    assert told.count("\n") == 1


def test_a_run_says_what_it_will_hold_and_what_it_held(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_rows(tmp_path)
    tiny_folder(tmp_path / "policy")
    _, data = build("dpo", str(tmp_path / "policy"), tmp_path)
    optimizer = functools.partial(torch.optim.AdamW, lr=1e-3)
    for lora, roles in (
        (None, "policy .* for training .*; reference .*, frozen"),
        (Lora(r=2), "policy [^;]* training [^;]*"),
    ):
        caplog.clear()
        with caplog.at_level(logging.INFO):
            quick_trainer(max_steps=1).fit(
                DPOModule(Network(str(tmp_path / "policy"), lora=lora), optimizer=optimizer), data
            )
        (said,) = [record.getMessage() for record in caplog.records if "before activations" in record.getMessage()]
        assert re.fullmatch(rf"memory: {roles}; [\d,]+ MiB in all before activations", said), said
        assert any(record.getMessage().startswith("peak memory: ") for record in caplog.records)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"), reason="another C library than glibc")
def test_freed_memory_is_kept_unless_the_environment_says_otherwise() -> None:
    """In a process of its own: a tensor causes no page faults where a larger one has been."""
    script = """
import resource, sys, torch
from lit_align.modules.memory import keep_freed_memory
if len(sys.argv) > 1: assert keep_freed_memory()
def faults(size):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(size)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults(15_000_000)
print(faults(10_000_000))
"""

    def faults(*arguments: str, **environment: str) -> int:
        command = [sys.executable, "-W", "ignore", "-c", script, *arguments]
        done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=True)
        return int(done.stdout)

    assert faults("keep") < 100
    assert faults() > 10
    own = {"MALLOC_MMAP_MAX_": "65536", "MALLOC_MMAP_THRESHOLD_": "1000000", "MALLOC_TRIM_THRESHOLD_": "1000000"}
    assert faults("keep", **own) > 10
