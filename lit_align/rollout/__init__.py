"""Prompts to completions."""

from lit_align.rollout.engine import Engine, Sampling
from lit_align.rollout.transformers_engine import TransformersEngine
from lit_align.rollout.vllm_engine import VLLMEngine

__all__ = ["Engine", "Sampling", "TransformersEngine", "VLLMEngine"]
