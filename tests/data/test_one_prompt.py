"""What is held out leaves something to train on, or says why there is nothing."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest

from lit_align.data.instruction import InstructionDataModule
from lit_align.data.preference import PreferenceDataModule
from lit_align.data.source import Source


@pytest.mark.parametrize("fraction", [0.05, 0.999])
@pytest.mark.parametrize("kind", [InstructionDataModule, PreferenceDataModule])
def test_one_prompt_in_every_row_is_trained_on(
    write: Callable[[str, Any], str], tokenizer_folder: str, caplog: Any, kind: Any, fraction: float
) -> None:
    names = ["output"] if kind is InstructionDataModule else ["chosen", "rejected"]
    answers = [{name: f"{name} {n}" for name in names} for n in range(9)]
    rows = [{"instruction": "Tell me a joke.", **answer} for answer in answers]
    data = kind(tokenizer_folder, [Source(write("x.jsonl", rows))], val_fraction=fraction, cache_dir="none")
    with caplog.at_level(logging.INFO):
        data.setup("fit")
    assert len(data.training_items(99)) == 9
    if fraction > 0.9:
        assert "all 9 examples have the same prompt: none is held out for validation" in caplog.text


def test_all_of_several_prompts_held_out(write: Callable[[str, Any], str], tokenizer_folder: str) -> None:
    rows = [{"instruction": f"Joke {n % 2}", "output": str(n)} for n in range(6)]
    data = InstructionDataModule(
        tokenizer_folder, [Source(write("x.jsonl", rows))], val_fraction=0.999, cache_dir="none"
    )
    with pytest.raises(
        ValueError, match=r"val_fraction 0\.999 holds out all 2 prompts of the 6 examples, and none is left"
    ):
        data.setup("fit")
