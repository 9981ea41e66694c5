"""Prompts to completions."""

from lit_align.rollout.answers import as_rollout, stop_tokens
from lit_align.rollout.engine import Engine, Sampling
from lit_align.rollout.transformers_engine import TransformersEngine
from lit_align.rollout.vllm_engine import VLLMEngine

__all__ = ["Engine", "Sampling", "TransformersEngine", "VLLMEngine", "as_rollout", "stop_tokens"]
