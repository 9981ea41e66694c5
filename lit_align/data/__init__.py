"""Data: public formats into one row schema, rows into tokens, tokens into batches."""

from lit_align.data.instruction import InstructionDataModule
from lit_align.data.preference import PreferenceDataModule
from lit_align.data.prompt import PromptDataModule
from lit_align.data.rows import Row, Rows
from lit_align.data.source import Source

__all__ = ["InstructionDataModule", "PreferenceDataModule", "PromptDataModule", "Row", "Rows", "Source"]
