"""Rows of the world: other parts hold other prompts, and sums come with their results."""

from __future__ import annotations

from lit_align.sandbox.sources import Prompts, Sums, prompt_from
from lit_align.sandbox.world import World


def texts(source: Prompts) -> list[str]:
    return [row["prompt"][-1]["content"] for row in source]


def test_parts_are_other_draws_from_the_same_world() -> None:
    parts = [Prompts(3, 200, part=part) for part in (0, 1, 2)]
    drawn = [texts(part) for part in parts]
    assert drawn[0] == texts(Prompts(3, 200))
    assert len({tuple(part) for part in drawn}) == 3
    assert len({part.fingerprint for part in parts}) == 3
    world = World(3)
    assert all(world.has(prompt_from(row)) for part in parts for row in part)
    assert {row["split"] for part in parts for row in part} == {"train"}


def test_sums_know_their_result() -> None:
    rows = list(Sums(3, 300))
    assert {row["category"] for row in rows} == {"arithmetic"}
    for row in rows:
        left, operation, right = row["key"]
        assert row["reference"] == str(left + right if operation == "plus" else left - right)
    # Held-out prompts ask for other sums.
    held_out = list(Sums(3, 376, "held_out", distinct=True))
    assert len({row["prompt"][-1]["content"] for row in held_out}) == 376
    assert not {tuple(row["key"]) for row in rows} & {tuple(row["key"]) for row in held_out}
