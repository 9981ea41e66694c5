"""Stop tokens for an engine, and its completions as a rollout."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lit_align.models.language import LanguageModel
from lit_align.types import Completion, Rollout


def stop_tokens(policy: LanguageModel, tokenizer: PreTrainedTokenizerBase, more: Iterable[int] = ()) -> list[int]:
    """Tokens that end a completion, ascending: those of the model, the tokenizer, and `more`."""
    own: Any = policy.hf.generation_config.eos_token_id
    stops = [*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id, *more]
    return sorted({stop for stop in stops if stop is not None})


def as_rollout(
    prompts: Sequence[Tensor],
    rows: Sequence[dict[str, Any]],
    answers: Sequence[Sequence[Completion]],
    tokenizer: PreTrainedTokenizerBase,
) -> Rollout:
    """Combine an engine's completions (equally many per prompt) with prompts, rows and decoded text."""
    samples = len(answers[0]) if answers else 1
    completions = [completion for given in answers for completion in given]
    texts = tokenizer.batch_decode([completion.tokens for completion in completions], skip_special_tokens=True)
    return Rollout(
        [prompt for prompt in prompts for _ in range(samples)],
        [row for row in rows for _ in range(samples)],
        completions,
        [text.strip() for text in texts],
        samples,
    )
