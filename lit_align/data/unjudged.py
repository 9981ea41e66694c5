"""Answers to score, whether or not anybody judged them."""

from __future__ import annotations

from collections.abc import Sequence

from lit_align.data.instruction import group_of
from lit_align.data.messages import answer_in
from lit_align.data.preference import PreferenceDataModule
from lit_align.data.rows import BadField, Row, Tally
from lit_align.data.store import Item, Store
from lit_align.types import PackedBatch


class AnswerDataModule(PreferenceDataModule):
    """Packed batches of answers: demonstrations, rankings, or what a policy said to prompts (`format: answers`).

    One example is one prompt with all its answers; of a conversation, the last turn is the answer.
    """

    def encode(self, row: Row, tally: Tally) -> Sequence[Item]:
        """One item."""
        if "messages" in row:
            *prompt, last = row["messages"]
            if last["role"] != "assistant" or not prompt:
                raise BadField("messages", "must end with an assistant turn after a prompt")
            row = {**row, "prompt": prompt, "completions": [answer_in(last, "messages")]}
        elif "completion" in row:
            row = {**row, "completions": [row["completion"]]}
        elif "completions" not in row:
            raise BadField(next(iter(row)), "has no answer: expected demonstrations, rankings, or format: answers")
        answers = row["completions"]
        example = self._tokens(row, answers, row.get("finished") or [True] * len(answers), tally)
        return [Item(example, [], [], group_of(row["prompt"]), {})]

    def usable(self, store: Store, name: str) -> None:
        """All items: nothing is compared."""

    def collate(self, items: Sequence[Item]) -> PackedBatch:  # type: ignore[override]
        """Packed rows."""
        return self.pack([item.example for item in items])
