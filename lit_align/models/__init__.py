"""One door to transformers: load, adapt, run on packed batches, export."""

from lit_align.models.export import export
from lit_align.models.language import LanguageModel, TokenScores
from lit_align.models.load import load_causal_lm, load_scorer, load_tokenizer
from lit_align.models.network import Lora, Network
from lit_align.models.scalar import ScalarModel, ValueHead

__all__ = [
    "LanguageModel",
    "Lora",
    "Network",
    "ScalarModel",
    "TokenScores",
    "ValueHead",
    "export",
    "load_causal_lm",
    "load_scorer",
    "load_tokenizer",
]
