"""Launched by torchrun or by SLURM, two processes leave what one leaves: metrics, checkpoint, model."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas
import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file
from support.configs import config
from support.metrics import steady
from support.processes import torchrun
from support.runs import write_rows
from support.tiny import tiny_folder

from lit_align.cli.commands import experiments
from lit_align.cli.entry import main
from lit_align.modules.zero import DEEPSPEED

TOLERANCE = 1e-6  # what is logged or exported is in fp32
FP32_TOLERANCE = 1e-5  # six steps of AdamW at 0.01, all of it in fp32

needs_deepspeed = pytest.mark.skipif(not DEEPSPEED, reason="DeepSpeed is not installed")


@pytest.fixture
def place(tmp_path: Path) -> tuple[str, Path]:
    write_rows(tmp_path)
    return tiny_folder(tmp_path / "model"), tmp_path


def written(
    place: tuple[str, Path],
    method: str,
    name: str,
    devices: int,
    lora: bool = False,
    dtype: str = "float64",
    **trainer: Any,
) -> str:
    """The configuration of a run of six optimizer steps on batches of four."""
    folder, root = place
    precision = f"{dtype.removeprefix('float')}-true"
    trainer = {"max_steps": 6, "devices": devices, "precision": precision, "gradient_clip_val": 0.5, **trainer}
    content = config(method, folder, root, root / name, **trainer)
    content["data"]["init_args"]["batch_size"] = 4 // devices
    content["model"]["init_args"]["network"] |= {"dtype": dtype, "lora": {"r": 4} if lora else None}
    (root / f"{name}.yaml").write_text(yaml.safe_dump(content))
    return str(root / f"{name}.yaml")


def leaves(value: Any, path: str = "") -> dict[str, Any]:
    if isinstance(value, dict | list | tuple):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {key: leaf for name, item in items for key, leaf in leaves(item, f"{path}/{name}").items()}
    return {path: value}


def left(folder: Path) -> dict[str, Any]:
    """What a run left, as numbers by name."""
    checkpoint = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    kept = {key: checkpoint[key] for key in ("state_dict", "optimizer_states", "lr_schedulers", "global_step")}
    metrics = pandas.read_csv(io.StringIO(steady(folder / "metrics.csv"))).to_dict("list")
    return leaves({**kept, "exported": load_file(folder / "model" / "model.safetensors"), "metrics": metrics})


def assert_same(one: dict[str, Any], other: dict[str, Any], tolerance: float) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(other[name], value, rtol=0, atol=tolerance, msg=name)
        elif value is None:
            assert other[name] is None, name
        else:
            assert other[name] == pytest.approx(value, abs=tolerance, rel=tolerance, nan_ok=True), name


@pytest.mark.slow
def test_torchrun_is_one_process(place: tuple[str, Path]) -> None:
    main(["fit", "-c", written(place, "dpo", "one", 1)])
    torchrun("2", "-m", "lit_align", "fit", "-c", written(place, "dpo", "two", 2, strategy="fsdp2"))
    assert_same(left(place[1] / "one"), left(place[1] / "two"), TOLERANCE)


@pytest.mark.slow
def test_in_slices_a_run_is_resumed_to_the_bit(place: tuple[str, Path]) -> None:
    """With adapters, as what is frozen is in no checkpoint."""
    whole, broken = (
        written(place, "reward", name, 2, lora=True, strategy="fsdp2", val_check_interval=2)
        for name in ("whole", "broken")
    )
    torchrun("2", "-m", "lit_align", "fit", "-c", whole)
    stop = '--trainer.callbacks=[{"class_path": "support.stop.StopAt", "init_args": {"batch": 3}}]'
    with pytest.raises(AssertionError, match="RuntimeError: stopped"):
        torchrun("2", "-m", "lit_align", "fit", "-c", broken, stop)
    torchrun("2", "-m", "lit_align", "fit", "-c", broken, "--ckpt_path", "last")
    outcome = left(place[1] / "whole")
    assert not any("base_layer" in name for name in outcome if name.startswith("/state_dict"))
    assert_same(outcome, left(place[1] / "broken"), 0.0)
    main(["fit", "-c", written(place, "reward", "one", 1, lora=True, val_check_interval=2)])
    assert_same(left(place[1] / "one"), outcome, TOLERANCE)


@pytest.mark.slow
@needs_deepspeed
@pytest.mark.parametrize(("method", "lora", "stage"), [("sft", False, 1), ("dpo", False, 2), ("reward", True, 2)])
def test_zero_is_one_process_and_is_resumed_to_the_bit(
    method: str, lora: bool, stage: int, place: tuple[str, Path]
) -> None:
    told: dict[str, Any] = {"lora": lora, "dtype": "float32", "val_check_interval": 2, "accumulate_grad_batches": 2}
    whole, broken = (written(place, method, name, 2, strategy=f"zero{stage}", **told) for name in ("whole", "broken"))
    torchrun("2", "-m", "lit_align", "fit", "-c", whole)
    stop = '--trainer.callbacks=[{"class_path": "support.stop.StopAt", "init_args": {"batch": 6}}]'
    with pytest.raises(AssertionError, match="RuntimeError: stopped"):
        torchrun("2", "-m", "lit_align", "fit", "-c", broken, stop)
    torchrun("2", "-m", "lit_align", "fit", "-c", broken, "--ckpt_path", "last")
    outcome = left(place[1] / "whole")
    assert_same(outcome, left(place[1] / "broken"), 0.0)
    main(["fit", "-c", written(place, method, "one", 1, **told)])
    assert_same(left(place[1] / "one"), outcome, FP32_TOLERANCE)


@pytest.mark.slow
@needs_deepspeed
def test_zero_takes_no_step_in_silence(place: tuple[str, Path]) -> None:
    command = ("-m", "lit_align", "fit", "-c", written(place, "sft", "far", 2, dtype="float32", strategy="zero2"))
    says = r"lit-align: stopped after optimizer step \d: the gradient of the next is not finite: lower the "
    says += r"learning rate, or look at the data; the last checkpoint is \S+/far/checkpoints/last\.ckpt\n"
    with pytest.raises(AssertionError, match=says):
        torchrun("2", *command, "--model.init_args.optimizer.init_args.lr=1e38", "--checkpoint.every_n_train_steps=1")


@pytest.mark.slow
def test_an_adapter_is_gathered_from_its_slices(place: tuple[str, Path]) -> None:
    weights = []
    for devices, more in ((1, {}), (2, {"strategy": "fsdp2"})):
        path = Path(written(place, "reward", f"adapter{devices}", devices, lora=True, **more))
        content = yaml.safe_load(path.read_text())
        content["model"]["init_args"]["network"]["lora"]["export"] = "adapter"
        path.write_text(yaml.safe_dump(content))
        torchrun(str(devices), "-m", "lit_align", "fit", "-c", str(path))
        file = place[1] / path.stem / "model" / "adapter_model.safetensors"
        with safe_open(file, "pt") as opened:
            weights.append((leaves(load_file(file)), opened.metadata()))
    assert any(name.endswith("score.weight") for name in weights[0][0])
    assert_same(weights[0][0], weights[1][0], TOLERANCE)
    assert weights[0][1]["frozen_float64"] == weights[1][1]["frozen_float64"]


SRUN = """#!/bin/sh
# As many processes as SLURM would start, here.
shift
for rank in $(seq 0 $((SLURM_NTASKS - 1))); do
  SLURM_PROCID=$rank SLURM_LOCALID=$rank SLURM_NODEID=0 "$@" & started="$started $!"
done
for process in $started; do wait "$process" || exit 1; done
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "dtype", "tolerance"),
    [
        ("ddp", "float64", TOLERANCE),
        pytest.param("zero2", "float32", FP32_TOLERANCE, marks=needs_deepspeed),
    ],
)
def test_the_job_for_slurm_is_one_process(strategy: str, dtype: str, tolerance: float, place: tuple[str, Path]) -> None:
    root = place[1]
    (root / "bin").mkdir()
    (root / "bin" / "srun").write_text(SRUN)
    (root / "bin" / "lit-align").write_text(f'#!/bin/sh\nexec {sys.executable} -m lit_align "$@"\n')
    for file in (root / "bin").iterdir():
        file.chmod(0o755)
    job = {"JOB_ID": str(os.getpid()), "JOB_NAME": "lit_align", "JOB_NUM_NODES": "1", "NTASKS": "2"}
    job |= {"NTASKS_PER_NODE": "2", "NODELIST": "127.0.0.1"}
    environment = {
        **os.environ,
        **{f"SLURM_{name}": value for name, value in job.items()},
        "PATH": f"{root / 'bin'}:{os.environ['PATH']}",
        "PYTHONPATH": f"{Path(__file__).parents[1]}:{os.environ.get('PYTHONPATH', '')}",
        "OMP_NUM_THREADS": "1",
    }
    cluster = experiments() / "cluster"
    files = [
        "-c",
        written(place, "sft", "two", 2, dtype=dtype),
        "-c",
        str(cluster / f"{strategy}.yaml"),
        "--trainer.accelerator=cpu",
    ]
    command = ["bash", str(cluster / "slurm.sh"), *files]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    main(["fit", "-c", written(place, "sft", "one", 1, dtype=dtype)])
    assert_same(left(root / "one"), left(root / "two"), tolerance)
