"""The world's text as data sources: each class yields rows and is named in YAML as `rows: {class_path: ...}`."""

from __future__ import annotations

import hashlib
import inspect
import random
from collections.abc import Iterator
from itertools import islice

from lit_align.data.rows import Row, Rows, user
from lit_align.sandbox import texts as language
from lit_align.sandbox import world
from lit_align.sandbox.texts import demonstrations, documents
from lit_align.sandbox.world import Prompt, World

# The text of a seed changes with the code that makes it: nothing tokenised before may be mistaken for it.
_CODE = hashlib.sha256((inspect.getsource(world) + inspect.getsource(language)).encode()).hexdigest()


class WorldRows(Rows):
    """Base: rows made from the world of a seed."""

    def __init__(self, seed: int = 0, count: int = 1000) -> None:
        self.seed = seed
        self.count = count
        self.fingerprint = f"{_CODE} {sorted(vars(self).items())}"

    def rng(self) -> random.Random:
        """Randomness of this source alone: two kinds of text from one seed do not repeat each other's draws."""
        return random.Random(f"{type(self).__name__} {self.seed}")


class Documents(WorldRows):
    """Pretraining text.

    Args:
        seed: which world.
        count: documents.
    """

    def __iter__(self) -> Iterator[Row]:
        for document in islice(documents(World(self.seed), self.rng()), self.count):
            yield {"text": document}


class Demonstrations(WorldRows):
    """Training prompts with answers, a share of them flawed.

    Args:
        seed: which world.
        count: demonstrations.
        flawed: share of flawed answers.
    """

    def __init__(self, seed: int = 0, count: int = 1000, flawed: float = 0.3) -> None:
        self.flawed = flawed
        super().__init__(seed, count)

    def __iter__(self) -> Iterator[Row]:
        for prompt, answer in demonstrations(World(self.seed), self.rng(), self.count, self.flawed):
            yield {**prompt_row(prompt), "completion": answer}


class Prompts(WorldRows):
    """Prompts alone.

    Args:
        seed: which world.
        count: prompts.
        split: train or held_out.
        distinct: no text twice; needs enough of them.
        part: another number draws others from the same world.
    """

    mix: dict[str, float] | None = None

    def __init__(
        self, seed: int = 0, count: int = 1000, split: str = "train", distinct: bool = False, part: int = 0
    ) -> None:
        self.split = split
        self.distinct = distinct
        self.part = part
        super().__init__(seed, count)

    def rng(self) -> random.Random:
        """Of this part."""
        return random.Random(f"{type(self).__name__} {self.seed} {self.part}") if self.part else super().rng()

    def __iter__(self) -> Iterator[Row]:
        made = World(self.seed)
        draw = made.distinct_prompts if self.distinct else made.prompts
        for prompt in draw(self.split, self.count, self.rng(), self.mix):
            yield prompt_row(prompt)


class Sums(Prompts):
    """Prompts of arithmetic alone, with the right result as `reference`; arguments as of `Prompts`."""

    mix = {"arithmetic": 1.0}  # noqa: RUF012

    def __iter__(self) -> Iterator[Row]:
        for row in super().__iter__():
            yield {**row, "reference": str(World.result(prompt_from(row).key))}


def prompt_row(prompt: Prompt) -> Row:
    """A prompt as a row: a user's turn, and the columns that gold needs to judge the answer."""
    return {**prompt.to_row(), "prompt": user(prompt.text)}


def prompt_from(row: Row) -> Prompt:
    """Back from a row."""
    return Prompt.from_row({**row, "prompt": row["prompt"][-1]["content"]})
