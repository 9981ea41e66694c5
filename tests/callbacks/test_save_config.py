"""What a resumed run may change, and what it may not."""

from __future__ import annotations

from typing import Any

import pytest

from lit_align.callbacks.save_config import differences

RUN: dict[str, Any] = {
    "seed_everything": 0,
    "out": "runs/a",
    "trainer": {"max_steps": 10, "max_epochs": None, "precision": "32-true", "accumulate_grad_batches": 1},
    "checkpoint": {"every_n_train_steps": 2},
    "model": {"class_path": "SFTModule", "init_args": {"network": {"name": "m"}, "optimizer": {"lr": 0.1}}},
    "data": {"init_args": {"batch_size": 2, "num_workers": 0, "train": [{"path": "a"}], "cache_dir": None}},
}


def changed(key: str, value: Any) -> list[str]:
    """Differences after changing one key."""
    new = {name: _copied(part) for name, part in RUN.items()}
    here: Any = new
    *path, last = key.split(".")
    for part in path:
        here = here.setdefault(part, {})
    here[last] = value
    return differences(RUN, new)


def _copied(value: Any) -> Any:
    return {key: _copied(item) for key, item in value.items()} if isinstance(value, dict) else value


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("out", "runs/b"),
        ("ckpt_path", "last.ckpt"),
        ("trainer.max_steps", 20),
        ("trainer.max_epochs", 2),
        ("trainer.limit_val_batches", 1),
        ("trainer.logger", False),
        ("trainer.callbacks", []),
        ("trainer.accelerator", "gpu"),
        ("trainer.log_every_n_steps", 5),
        ("checkpoint.every_n_train_steps", 3),
        ("data.init_args.num_workers", 4),
        ("data.init_args.cache_dir", "none"),
    ],
)
def test_how_far_and_where_it_runs_is_free(key: str, value: Any) -> None:
    assert changed(key, value) == []


@pytest.mark.parametrize(
    ("key", "value", "line"),
    [
        ("seed_everything", 1, "seed_everything (0, now 1)"),
        ("trainer.precision", "bf16-mixed", "trainer.precision ('32-true', now 'bf16-mixed')"),
        ("trainer.accumulate_grad_batches", 2, "trainer.accumulate_grad_batches (1, now 2)"),
        ("trainer.gradient_clip_val", 1.0, "trainer.gradient_clip_val (None, now 1.0)"),
        ("trainer.limit_train_batches", 5, "trainer.limit_train_batches (None, now 5)"),
        ("trainer.val_check_interval", 0.5, "trainer.val_check_interval (None, now 0.5)"),
        ("model.class_path", "DPOModule", "model.class_path ('SFTModule', now 'DPOModule')"),
        ("model.init_args.network.name", "n", "model.init_args.network.name ('m', now 'n')"),
        ("model.init_args.optimizer.lr", 0.2, "model.init_args.optimizer.lr (0.1, now 0.2)"),
        ("data.init_args.batch_size", 4, "data.init_args.batch_size (2, now 4)"),
        ("data.init_args.train", [{"path": "b"}], "data.init_args.train ([{'path': 'a'}], now [{'path': 'b'}])"),
    ],
)
def test_what_is_trained_is_not(key: str, value: Any, line: str) -> None:
    assert changed(key, value) == [line]


def test_a_key_that_is_gone_or_new() -> None:
    without = {key: value for key, value in RUN.items() if key != "model"}
    assert differences(RUN, without) == [f"model ({RUN['model']!r}, now None)"]
    assert differences(without, RUN) == [f"model (None, now {RUN['model']!r})"]
    assert differences(RUN, RUN) == []
