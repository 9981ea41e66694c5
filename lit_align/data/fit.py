"""Make an example fit a length: cut where the user chose to, never so that nothing is scored."""

from __future__ import annotations

from typing import Literal

from lit_align.data.rows import BadField, Tally
from lit_align.types import Example, Segment

Truncate = Literal["prompt", "answer", "never"]


def fit(example: Example, max_length: int, truncate: Truncate, tally: Tally, bos: int | None = None) -> Example:
    """Shorten an example so that its longest sequence has at most `max_length` tokens; count it if it was cut.

    Args:
        example: trunk and branches.
        max_length: of a sequence, prompt included.
        truncate: "prompt" cuts the beginning of the prompt (and the end of an answer that is too long by itself),
            "answer" cuts the end of the answer, "never" refuses.
        tally: counts `truncated`.
        bos: a token that stays in front of a prompt whose beginning is cut, if it stood there.

    Raises:
        BadField: too long and not to be cut; or cutting the answer would leave nothing of it.
    """
    trunk, branches = example
    longest = len(trunk.tokens) + max((len(branch.tokens) for branch in branches), default=0)
    if longest <= max_length:
        return example
    if truncate == "never":
        raise BadField("tokens", f"number {longest}, above max_length {max_length}: raise it, or set truncate")
    cut = _cut_right(example, max_length) if truncate == "answer" else _cut_left(example, max_length)
    tally["truncated"] += 1
    if bos is not None and trunk.tokens[:1] == [bos] and cut.trunk.tokens:
        return Example(Segment([bos, *cut.trunk.tokens[1:]], cut.trunk.scored), cut.branches)
    return cut


def _cut_left(example: Example, max_length: int) -> Example:
    trunk, branches = example
    if not branches:
        return Example(_cut_left_scored(trunk, max_length))
    branches = [_head(branch, max_length - 1) for branch in branches]
    room = max_length - max(len(branch.tokens) for branch in branches)
    return Example(_tail(trunk, room), branches)


def _cut_right(example: Example, max_length: int) -> Example:
    trunk, branches = example
    cut = Example(_head(trunk, max_length), [_head(branch, max_length - len(trunk.tokens)) for branch in branches])
    if not all(any(segment.scored) for segment in (cut.branches or [cut.trunk])):
        raise BadField(
            "tokens",
            f"of the prompt number {max_length} or more, which leaves no room for the answer: set truncate: prompt",
        )
    return cut


def _cut_left_scored(trunk: Segment, max_length: int) -> Segment:
    """The end of a conversation; from the start of its last answer where that alone is too long."""
    last_answer = len(trunk.scored) - 1
    while last_answer and trunk.scored[last_answer - 1]:
        last_answer -= 1
    start = len(trunk.tokens) - max_length
    if start >= last_answer > 0:
        start = last_answer - 1  # one token of prompt, to predict the first of the answer from
    cut = _head(Segment(trunk.tokens[start:], trunk.scored[start:]), max_length)
    # The first token has nothing before it: it cannot be scored.
    return Segment(cut.tokens, [False, *cut.scored[1:]])


def _head(segment: Segment, length: int) -> Segment:
    return Segment(segment.tokens[: max(length, 0)], segment.scored[: max(length, 0)])


def _tail(segment: Segment, length: int) -> Segment:
    start = max(len(segment.tokens) - length, 0)
    return Segment(segment.tokens[start:], segment.scored[start:])


def chunk(document: Segment, max_length: int) -> list[Segment]:
    """A document in pieces of at most `max_length` tokens, each starting with the last token of the one before.

    Nothing is dropped: the shared token is predicted in one piece and predicts in the next.
    """
    step = max(max_length - 1, 1)
    starts = range(0, max(len(document.tokens) - 1, 1), step)
    return [
        Segment(document.tokens[s : s + max_length], [False, *document.scored[s + 1 : s + max_length]]) for s in starts
    ]


def over_budget(source: str, begin: str, tokens: int, room: int, max_length: int) -> ValueError:
    """What there is to say of an example that no micro-batch has room for."""
    return ValueError(
        f"{source}: the example that begins {begin!r} has {tokens:,} tokens with all its answers, above "
        f"data.micro_batch_tokens ({room:,}): raise that, or lower data.max_length ({max_length:,})"
    )
