from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lightning import Trainer
from support.runs import write_rows
from support.tiny import tiny_folder

from lit_align import InstructionDataModule, Network, SFTModule, Source


@pytest.fixture(scope="session")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A model and rows; nothing here is written to."""
    folder = tmp_path_factory.mktemp("parts")
    write_rows(folder)
    return tiny_folder(folder / "model"), folder


@pytest.fixture
def fit(parts: tuple[str, Path], tmp_path: Path) -> Callable[..., Trainer]:
    """Fit an SFT module for four batches, one epoch, with some callbacks; without the command line."""

    def run(
        *callbacks: Any,
        data: dict[str, Any] | None = None,
        network: Any = None,
        model: dict[str, Any] | None = None,
        **options: Any,
    ) -> Trainer:
        folder, rows = parts
        data = {"val_fraction": 0.0, "batch_size": 2, "cache_dir": "none", **(data or {})}
        options = {"max_epochs": 1, "enable_checkpointing": False, "logger": False, **options}
        trainer = Trainer(
            accelerator="cpu",
            callbacks=list(callbacks),
            enable_model_summary=False,
            default_root_dir=tmp_path,
            **options,
        )
        module = SFTModule(network or Network(folder), **(model or {}))
        trainer.fit(module, InstructionDataModule(folder, [Source(str(rows / "demos.json"))], **data))
        return trainer

    return run
