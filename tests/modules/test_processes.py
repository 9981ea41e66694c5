"""Two processes are one: loss, gradient and metrics, under DDP and in slices, in float64; with DeepSpeed in fp32.

Seen to fail: gradients that are not scaled by the number of processes; explained variance averaged over processes;
DeepSpeed that is not told what to divide by, or clips before it has divided.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from support.processes import in_two_processes
from support.runs import ESTIMATORS, METHODS, SUPERVISED, TARGETS, Result, build, one_step, write_rows
from support.tiny import tiny_folder

from lit_align.callbacks import CompletionsTable
from lit_align.callbacks.checkpoint_io import AtomicCheckpointIO
from lit_align.modules import FSDP2Strategy, ZeROStrategy
from lit_align.modules.zero import DEEPSPEED

needs_deepspeed = pytest.mark.skipif(not DEEPSPEED, reason="DeepSpeed is not installed")
TOLERANCE = 1e-10
METRIC_TOLERANCE = 1e-6  # they are kept in fp32
ZERO_TOLERANCE = 1e-6
ZERO: dict[str, Any] = {"dtype": "float32", "precision": "32-true"}
# Seven held-out rows are no even number, and six micro-batches of a batch need not be either.
CASES: dict[str, dict[str, Any]] = {
    **{method: {} for method in (*METHODS, *ESTIMATORS, *TARGETS, *SUPERVISED)},
    **{f"{method}:silent": {} for method in ("ppo", "ppo_separate_value", "ppo_grpo", "ppo_reinforce++")},
    "sft fsdp2": {"clip": 0.5},
    "sft:recomputed fsdp2": {},
    "sft fsdp2 gpt2": {"accumulate": 2, "batch_size": 2},
    "reward fsdp2": {},
    "reward:lora fsdp2": {},
    "dpo fsdp2": {},
    "dpo_cached fsdp2": {},
    "dpo:lora fsdp2": {},
    **{f"{method} zero{stage}": ZERO for method in ("sft", "reward", "dpo", "dpo:lora") for stage in (1, 2)},
    "dpo_cached zero2": ZERO,
    "sft:recomputed zero2": {**ZERO, "clip": 0.5},
    "sft zero1 gpt2": {**ZERO, "accumulate": 2, "batch_size": 2, "clip": 0.5},
    "sft zero2 gpt2": {**ZERO, "accumulate": 2, "batch_size": 2},
}


def place(root: Path, architecture: str) -> str:
    folder = root / architecture / "policy"
    if not folder.exists():
        tied = {"tie_word_embeddings": True} if architecture == "gpt2" else {}
        tiny_folder(folder, architecture, **tied)
        tiny_folder(root / architecture / "reference", architecture, seed=1, **tied)
    return str(folder)


def job(name: str, root: Path) -> dict[str, Any]:
    method, strategy, architecture = [*name.split(), *("ddp", "llama")[len(name.split()) - 1 :]]
    return {
        "method": method,
        "folder": place(root, architecture),
        "rows": str(root),
        "strategy": strategy,
        "batch_size": 4,
        "held_out": 7,
        **({"micro_batch_size": 4} if method.startswith("ppo") else {"micro_batch_tokens": 120}),
        **CASES[name],
    }


@pytest.fixture(scope="module")
def two(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Callable[[str], tuple[Result, Result]]:
    """What a job gives in one process and in two; those in two run together, once, as many as are asked for."""
    asked = [item.callspec.params["name"] for item in request.session.items if request.fixturename in item.fixturenames]
    root = tmp_path_factory.mktemp("processes")
    write_rows(root)
    together = in_two_processes({name: job(name, root) for name in asked if DEEPSPEED or "zero" not in name}, root)

    def both(name: str) -> tuple[Result, Result]:
        told = job(name, root) | {"strategy": "auto", "rows": root}
        return one_step(**{**told, "batch_size": 2 * told["batch_size"]}), together[name]

    return both


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=needs_deepspeed if "zero" in name else ()) for name in CASES]
)
def test_two_processes_are_one(name: str, two: Callable[[str], tuple[Result, Result]]) -> None:
    (loss, weights, metrics), (other_loss, other_weights, other_metrics) = two(name)
    tolerance = ZERO_TOLERANCE if "zero" in name else TOLERANCE
    assert other_loss == pytest.approx(loss, abs=tolerance)
    assert weights.keys() == other_weights.keys()
    for key, weight in weights.items():
        assert (weight - other_weights[key]).abs().max() < tolerance, key
    assert metrics.pop("held") == 1.0
    assert other_metrics.pop("held") == pytest.approx(0.5 if "fsdp2" in name else 1.0, abs=0.01)
    assert other_metrics == pytest.approx(metrics, abs=METRIC_TOLERANCE, rel=METRIC_TOLERANCE)
    assert any(key.startswith("val/") for key in metrics)


# Kills: DDP of one process taken for none; it wants all gradients from one backward, too.
@pytest.mark.parametrize("method", ["ppo", "ppo_separate_value"])
def test_ddp_on_one_device_is_no_ddp(method: str, tmp_path: Path) -> None:
    write_rows(tmp_path)
    told: dict[str, Any] = {"method": method, "folder": place(tmp_path, "llama"), "rows": tmp_path, "batch_size": 4}
    loss, weights, _ = one_step(**told)
    try:
        other_loss, other_weights, _ = one_step(**told, strategy="ddp")
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    assert other_loss == pytest.approx(loss, abs=TOLERANCE)
    assert all(torch.allclose(weight, other_weights[key], rtol=0, atol=TOLERANCE) for key, weight in weights.items())


@pytest.mark.slow
@needs_deepspeed
def test_under_autocast_zero_is_ddp(tmp_path: Path) -> None:
    """Which cuts up the batch as they do: what bf16 rounds away is the same."""
    write_rows(tmp_path)
    told = job("sft zero2", tmp_path) | {"clip": 0.5}
    jobs = {name: told | {"strategy": name, "precision": "bf16-mixed"} for name in ("ddp", "zero1", "zero2")}
    results = in_two_processes({**jobs, "fp32": told | {"strategy": "ddp"}}, tmp_path)
    loss, weights, _ = results["ddp"]

    def far(name: str) -> float:
        return max(float((weight - results[name][1][key]).abs().max()) for key, weight in weights.items())

    assert far("fp32") > 100 * ZERO_TOLERANCE
    for name in ("zero1", "zero2"):
        assert results[name][0] == pytest.approx(loss, abs=ZERO_TOLERANCE)
        assert far(name) < ZERO_TOLERANCE, name


@pytest.mark.parametrize(
    ("method", "stage", "strategy", "says"),
    [
        ("sft", "fit", DeepSpeedStrategy, "exact count of what is scored.*use trainer.strategy: zero1 or zero2"),
        ("sft", "fit", FSDPStrategy, r"FSDP1\) is not supported: use trainer.strategy: fsdp2"),
        ("sft", "fit", ModelParallelStrategy, "use trainer.strategy: fsdp2"),
        ("ppo", "fit", FSDP2Strategy, "PPOModule samples from its model.*use trainer.strategy: ddp"),
        ("sft", "predict", FSDP2Strategy, "SFTModule samples from its model"),
        ("ppo", "fit", ZeROStrategy, "PPOModule steps its optimizer itself.*use trainer.strategy: ddp"),
        ("ppo", "validate", ZeROStrategy, None),
        ("sft", "fit", ZeROStrategy, None),
        ("sft", "predict", ZeROStrategy, None),
        ("sft", "fit", FSDP2Strategy, None),
        ("reward", "predict", FSDP2Strategy, None),
        ("ppo", "fit", DDPStrategy, None),
    ],
)
def test_what_is_refused_says_what_to_use(
    method: str, stage: str, strategy: type, says: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_rows(tmp_path)
    module, _ = build(method, place(tmp_path, "llama"), tmp_path)
    engine = strategy.__new__(strategy)  # those of DeepSpeed need its package to be made
    engine._precision_plugin = Precision()
    monkeypatch.setattr(strategy, "root_device", SimpleNamespace(type="meta"))
    module.trainer = SimpleNamespace(strategy=engine)  # type: ignore[assignment]
    if says is None:
        module.setup(stage)
        return
    with pytest.raises(ValueError, match=says):
        module.setup(stage)


@pytest.mark.parametrize(
    ("kind", "precision"),
    [(FSDP2Strategy, "16-mixed"), (ZeROStrategy, "16-mixed"), (ZeROStrategy, "bf16-true"), (ZeROStrategy, "64-true")],
)
def test_the_scaler_of_fp16_and_other_weights_than_fp32_are_refused(kind: type, precision: Any, tmp_path: Path) -> None:
    write_rows(tmp_path)
    module, _ = build("sft", place(tmp_path, "llama"), tmp_path)
    strategy, plugin = kind.__new__(kind), Precision()
    plugin.precision = precision
    strategy._precision_plugin = plugin
    module.trainer = SimpleNamespace(strategy=strategy)  # type: ignore[assignment]
    with pytest.raises(ValueError, match="precision to bf16-mixed"):
        module.setup("fit")


def test_a_table_of_completions_is_refused_by_its_name() -> None:
    trainer: Any = SimpleNamespace(strategy=FSDP2Strategy())
    module: Any = SimpleNamespace(answer=None)
    with pytest.raises(ValueError, match="CompletionsTable samples from its model"):
        CompletionsTable(["hello"]).setup(trainer, module, "fit")


def test_in_slices_a_damaged_checkpoint_is_told_as_elsewhere(tmp_path: Path) -> None:
    strategy, path = FSDP2Strategy(), tmp_path / "last.ckpt"
    strategy.checkpoint_io = AtomicCheckpointIO()
    AtomicCheckpointIO().save_checkpoint({"state_dict": {"w": torch.ones(9)}, "pytorch-lightning_version": "2"}, path)
    kept = AtomicCheckpointIO().load_checkpoint(path, map_location="cpu")
    assert torch.equal(kept["state_dict"]["w"], torch.ones(9))
    whole = path.read_bytes()
    at = whole.index(torch.ones(9).numpy().tobytes())
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    with pytest.raises(ValueError, match="is damaged and cannot be read"):
        strategy.load_checkpoint(path)
