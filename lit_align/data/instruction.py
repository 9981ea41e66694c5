"""Demonstrations to imitate: conversations, prompts with an answer, plain text."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from lit_align.data.base import TextDataModule
from lit_align.data.fit import chunk, fit
from lit_align.data.rows import BadField, Row, Tally
from lit_align.data.store import Item
from lit_align.types import Example, PackedBatch, Segment


def group_of(prompt: Any) -> str:
    """A hash of a prompt: what the validation split keeps together."""
    return hashlib.sha256(json.dumps(prompt, sort_keys=True).encode()).hexdigest()[:16]


class InstructionDataModule(TextDataModule):
    """Packed batches of demonstrations, for SFT; see `TextDataModule` for the arguments.

    Conversations and prompts with an answer are scored on what the assistant says, the stop token included; plain text
    is scored everywhere, and cut into pieces of `max_length`, none of it dropped.
    """

    def encode(self, row: Row, tally: Tally) -> Sequence[Item]:
        """One item for a conversation, one or more for a text."""
        encoder = self._encoder()
        if "text" in row:
            pieces = chunk(encoder.text(row["text"]), self.max_length)
            return [Item(Example(piece), [], [], group_of(row["text"]), {}) for piece in pieces]
        if "messages" in row:
            sequence, prompt = encoder.conversation(row["messages"]), row["messages"][:-1]
        elif "completion" in row:
            prompt = row["prompt"]
            ids, answer = encoder.prompt(prompt), encoder.answer(prompt, row["completion"])
            sequence = Segment([*ids, *answer.tokens], [False] * len(ids) + list(answer.scored))
        else:
            raise BadField(
                next(iter(row)), "belongs to rankings or bare prompts, which hold no demonstration to imitate"
            )
        return [Item(fit(Example(sequence), self.max_length, self.truncate, tally), [], [], group_of(prompt), {})]

    def collate(self, items: Sequence[Item]) -> PackedBatch:
        """Packed rows."""
        return self.pack([item.example for item in items])
