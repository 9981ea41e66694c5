"""Rollouts written by hand."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedTokenizerBase

from lit_align.data.chat import ChatEncoder
from lit_align.types import Completion, Rollout


def rollout(tokenizer: PreTrainedTokenizerBase, answers: Sequence[tuple[str, str, bool]], samples: int = 1) -> Rollout:
    """Answers to questions.

    Args:
        tokenizer: whose tokens they are.
        answers: question, answer, and whether it finished; the answers to a question stand together.
        samples: answers per question.
    """
    encoder = ChatEncoder(tokenizer)
    rows = [{"prompt": [{"role": "user", "content": question}]} for question, _, _ in answers]
    prompts = [torch.tensor(encoder.prompt(row["prompt"])) for row in rows]
    tokens = [
        list(encoder.answer(row["prompt"], text, finished).tokens)
        for row, (_, text, finished) in zip(rows, answers, strict=True)
    ]
    completions = [Completion(ids, finished) for ids, (_, _, finished) in zip(tokens, answers, strict=True)]
    return Rollout(prompts, rows, completions, [text for _, text, _ in answers], samples)
