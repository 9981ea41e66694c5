import pytest
from data.fuzz import fuzz
from hypothesis import given
from hypothesis import strategies as st

from lit_align.data.fit import chunk, fit
from lit_align.data.rows import BadField, Tally
from lit_align.types import Example, Segment


def conversation(*runs: int) -> Example:
    """Runs of tokens in turn unscored and scored; tokens count from 0."""
    scored = [bool(i % 2) for i, length in enumerate(runs) for _ in range(length)]
    return Example(Segment(list(range(len(scored))), scored))


def tree(prompt: int, *answers: int) -> Example:
    """Prompt tokens count from 0, those of the k-th answer from 100 * k."""
    branches = [Segment(list(range(100 * k, 100 * k + n)), [True] * n) for k, n in enumerate(answers, start=1)]
    return Example(Segment(list(range(prompt)), [False] * prompt), branches)


def tokens(example: Example) -> list[list[int]]:
    return [list(segment.tokens) for segment in (example.trunk, *example.branches)]


def test_what_fits_is_left_alone() -> None:
    tally = Tally()
    for example, length in [(conversation(3, 4), 7), (tree(4, 2, 6), 10)]:
        for truncate in ("prompt", "answer", "never"):
            assert fit(example, length, truncate, tally) is example
    assert not tally


def test_prompt_is_cut_from_its_left() -> None:
    tally = Tally()
    assert tokens(fit(tree(5, 2, 3), 6, "prompt", tally)) == [[2, 3, 4], [100, 101], [200, 201, 202]]
    cut = fit(conversation(4, 3), 5, "prompt", tally).trunk
    assert cut == Segment([2, 3, 4, 5, 6], [False, False, True, True, True])
    assert tally == {"truncated": 2}


def test_answer_is_cut_from_its_right() -> None:
    tally = Tally()
    assert tokens(fit(tree(5, 2, 4), 8, "answer", tally)) == [[0, 1, 2, 3, 4], [100, 101], [200, 201, 202]]
    assert fit(conversation(4, 3), 5, "answer", tally).trunk == Segment([0, 1, 2, 3, 4], [False] * 4 + [True])
    assert tally == {"truncated": 2}


def test_never_refuses() -> None:
    tally = Tally()
    with pytest.raises(BadField, match="'tokens' number 9, above max_length 8: raise it, or set truncate"):
        fit(tree(5, 2, 4), 8, "never", tally)
    assert not tally


def test_an_answer_too_long_by_itself_keeps_its_beginning_and_a_token_to_predict_it_from() -> None:
    assert tokens(fit(tree(5, 9, 2), 6, "prompt", Tally())) == [[4], [100, 101, 102, 103, 104], [200, 201]]
    assert fit(conversation(5, 9), 6, "prompt", Tally()).trunk == Segment([4, 5, 6, 7, 8, 9], [False] + [True] * 5)
    assert fit(conversation(5, 6), 6, "prompt", Tally()).trunk.tokens == [4, 5, 6, 7, 8, 9]


def test_a_conversation_keeps_its_last_answer() -> None:
    cut = fit(conversation(3, 3, 3, 3), 5, "prompt", Tally()).trunk
    assert cut == Segment([7, 8, 9, 10, 11], [False, False, True, True, True])
    # An earlier answer that is cut has nothing before its first token.
    cut = fit(conversation(3, 3, 3, 3), 8, "prompt", Tally()).trunk
    assert cut == Segment(list(range(4, 12)), [False, True] + [False] * 3 + [True] * 3)


def test_cutting_answers_never_leaves_one_without_a_token() -> None:
    tally = Tally()
    for example in (tree(5, 2, 4), conversation(5, 3)):
        with pytest.raises(BadField, match=r"'tokens' of the prompt number 5 or more, .* set truncate: prompt"):
            fit(example, 5, "answer", tally)
    assert not tally, "what is refused is not truncated"
    assert [len(branch.tokens) for branch in fit(tree(4, 2, 4), 5, "answer", tally).branches] == [1, 1]


def test_a_bare_prompt_keeps_its_end() -> None:
    assert tokens(fit(tree(7), 3, "prompt", Tally())) == [[4, 5, 6]]


RUNS = st.lists(st.integers(1, 12), min_size=2, max_size=7).map(lambda runs: runs[: len(runs) // 2 * 2])


@fuzz
@given(RUNS, st.integers(2, 40), st.sampled_from(["prompt", "answer"]))
def test_something_of_a_conversation_is_always_scored(runs: list[int], max_length: int, truncate: str) -> None:
    example = conversation(*runs)
    try:
        cut = fit(example, max_length, truncate, Tally()).trunk
    except BadField:
        assert truncate == "answer"
        assert max_length <= runs[0]
        return
    assert any(cut.scored)
    assert not cut.scored[0]
    assert len(cut.tokens) == len(cut.scored) == min(sum(runs), max_length)
    start = cut.tokens[0]
    assert cut.tokens == list(range(start, start + len(cut.tokens)))
    assert list(cut.scored[1:]) == list(example.trunk.scored[start + 1 : start + len(cut.tokens)])
    if truncate == "prompt":  # the last answer is there, from its first token on
        assert sum(runs[:-1]) in cut.tokens


@fuzz
@given(st.integers(1, 30), st.lists(st.integers(1, 30), min_size=2, max_size=5), st.integers(2, 40), st.booleans())
def test_every_answer_keeps_a_token(prompt: int, answers: list[int], max_length: int, from_left: bool) -> None:
    try:
        trunk, branches = fit(tree(prompt, *answers), max_length, "prompt" if from_left else "answer", Tally())
    except BadField:
        assert not from_left
        assert max_length <= prompt
        return
    assert len(trunk.tokens) >= 1
    assert len(trunk.tokens) + max(len(branch.tokens) for branch in branches) == min(prompt + max(answers), max_length)
    for k, branch in enumerate(branches, start=1):
        assert branch.tokens == list(range(100 * k, 100 * k + len(branch.tokens)))
        assert 1 <= len(branch.tokens) == len(branch.scored) == sum(branch.scored)
    assert trunk.tokens[-1] == prompt - 1, "the end of the prompt, which predicts the answers, is never cut"
    if not from_left:
        assert len(trunk.tokens) == prompt


@fuzz
@given(st.integers(2, 60), st.integers(2, 20))
def test_chunks_predict_every_token_once(length: int, max_length: int) -> None:
    document = Segment(list(range(length)), [False] + [True] * (length - 1))
    pieces = chunk(document, max_length)
    assert [t for p in pieces for t, s in zip(p.tokens, p.scored, strict=True) if s] == list(range(1, length))
    assert all(2 <= len(piece.tokens) <= max_length and not piece.scored[0] for piece in pieces)
    # Each token but the first of all is predicted from the one before it.
    assert all(list(piece.tokens) == list(range(piece.tokens[0], piece.tokens[-1] + 1)) for piece in pieces)


def test_chunk_of_what_fits() -> None:
    document = Segment([7, 8, 9], [False, True, True])
    assert chunk(document, 3) == chunk(document, 9) == [document]
    assert chunk(document, 2) == [Segment([7, 8], [False, True]), Segment([8, 9], [False, True])]
