"""Prompts to completions."""

from lit_align.rollout.engine import Engine, Sampling
from lit_align.rollout.transformers_engine import TransformersEngine

__all__ = ["Engine", "Sampling", "TransformersEngine"]
