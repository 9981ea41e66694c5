"""`trainer.fit(module, loader)`: batches from a plain DataLoader, without a data module."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer
from support.runs import echo, write_rows
from support.tiny import tiny_folder
from torch.utils.data import DataLoader, IterableDataset

from lit_align import (
    DPOModule,
    FunctionReward,
    InstructionDataModule,
    Network,
    PPOModule,
    PreferenceDataModule,
    PromptDataModule,
    Sampling,
    SFTModule,
    Source,
)
from lit_align.callbacks import CompletionsTable
from lit_align.modules import Linear

ADAM = functools.partial(torch.optim.AdamW, lr=0.01)


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp("parts")
    write_rows(folder)
    return tiny_folder(folder / "model"), folder


def batches(kind: Any, parts: tuple[str, Path], rows: str) -> list[Any]:
    """Four batches of two rows."""
    data = kind(parts[0], [Source(str(parts[1] / rows))], batch_size=2, val_fraction=0.0, cache_dir="none")
    data.setup("fit")
    return list(data.train_dataloader())


def trainer(folder: Path, **options: Any) -> Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return Trainer(
        accelerator="cpu", default_root_dir=folder, enable_model_summary=False, **{**quiet, "max_epochs": 2, **options}
    )


@pytest.mark.filterwarnings("ignore:The 'val_dataloader':UserWarning")
@pytest.mark.parametrize("method", ["sft", "dpo", "ppo"])
def test_a_schedule_knows_its_end(parts: tuple[str, Path], tmp_path: Path, method: str) -> None:
    common: dict[str, Any] = {"schedule": Linear(warmup=1), "optimizer": ADAM}
    if method == "sft":
        module: Any = SFTModule(Network(parts[0]), **common)
        held = batches(InstructionDataModule, parts, "demos.json")
    elif method == "dpo":
        module = DPOModule(Network(parts[0]), **common)
        held = batches(PreferenceDataModule, parts, "rankings.json")
    else:
        common |= {"epochs": 1, "mini_batches": 2, "micro_batch_size": 2}
        common["sampling"] = Sampling(max_new_tokens=4, samples=2)
        module = PPOModule(
            Network(parts[0]),
            FunctionReward(echo),
            **common,
        )
        held = batches(PromptDataModule, parts, "demos.json")
    loader: Any = DataLoader(held, batch_size=None)  # type: ignore[arg-type]
    run = trainer(tmp_path, limit_train_batches=3, limit_val_batches=1)
    run.fit(module, loader, *([loader] if method != "ppo" else []))
    steps = 2 * 3 * module.optimizer_steps_per_batch
    assert run.global_step == module.total_steps() == steps
    # One step of warm-up, then down to 0 at the end.
    assert module.schedule.factor(steps, module.total_steps()) == 0.0
    assert run.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.0)


def test_the_weights_are_those_of_the_data_module(parts: tuple[str, Path], tmp_path: Path) -> None:
    data = InstructionDataModule(
        parts[0], [Source(str(parts[1] / "demos.json"))], batch_size=2, val_fraction=0.0, cache_dir="none"
    )
    torch.manual_seed(0)
    one, other = (SFTModule(Network(parts[0]), schedule=Linear(), optimizer=ADAM) for _ in range(2))
    trainer(tmp_path, max_epochs=1, limit_val_batches=0).fit(one, data)
    held = batches(InstructionDataModule, parts, "demos.json")
    trainer(tmp_path, max_epochs=1).fit(other, DataLoader(held, batch_size=None))  # type: ignore[arg-type]
    for mine, theirs in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs)


class Endless(IterableDataset):
    def __init__(self, held: list[Any]) -> None:
        self.held = held

    def __iter__(self) -> Iterator[Any]:
        while True:
            yield from self.held


def test_a_loader_without_a_length_needs_max_steps(parts: tuple[str, Path], tmp_path: Path) -> None:
    loader: Any = DataLoader(Endless(batches(InstructionDataModule, parts, "demos.json")), batch_size=None)
    with pytest.raises(ValueError, match=r"a schedule needs an end: .* trainer\.max_steps"):
        trainer(tmp_path).fit(SFTModule(Network(parts[0]), schedule=Linear(), optimizer=ADAM), loader)
    run = trainer(tmp_path, max_steps=5)
    run.fit(SFTModule(Network(parts[0]), schedule=Linear(), optimizer=ADAM), loader)
    assert run.global_step == 5


@pytest.mark.filterwarnings("ignore:The 'val_dataloader':UserWarning")
def test_the_table_of_answers(parts: tuple[str, Path], tmp_path: Path) -> None:
    loader: Any = DataLoader(batches(InstructionDataModule, parts, "demos.json"), batch_size=None)  # type: ignore[arg-type]
    table = CompletionsTable(["say a"])
    module = SFTModule(Network(parts[0]), optimizer=ADAM, sampling=Sampling(max_new_tokens=3))
    trainer(tmp_path, max_epochs=1, callbacks=[table]).fit(module, loader, loader)
    assert (tmp_path / "said.jsonl").read_text().count("say a") == 1


def test_a_cached_reference_names_what_it_needs(parts: tuple[str, Path], tmp_path: Path) -> None:
    loader: Any = DataLoader(batches(PreferenceDataModule, parts, "rankings.json"), batch_size=None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="cache_reference needs a PreferenceDataModule, and a plain loader is none"):
        trainer(tmp_path).fit(DPOModule(Network(parts[0]), cache_reference=True, optimizer=ADAM), loader)
