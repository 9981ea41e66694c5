from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from lit_align.evaluation.win_rate import by_score, length_only, order_only, planted_biases, win_rate

RNG = np.random.default_rng(0)
PROMPTS = [f"p{n // 2}" for n in range(300)]


def answers(seed: int, mean: float = 20.0) -> list[str]:
    rng = np.random.default_rng(seed)
    return [f"{rng.normal():.6f} " + "w " * int(max(rng.normal(mean, 5), 0)) for _ in PROMPTS]


def quality(prompts: Sequence[Any], texts: Sequence[str]) -> list[float]:
    return [float(text.split()[0]) for text in texts]


def test_a_policy_against_itself_is_one_half_in_95_of_100() -> None:
    covered = 0
    for repeat in range(200):
        told = win_rate(PROMPTS, answers(2 * repeat), answers(2 * repeat + 1), by_score(quality), resamples=100)
        covered += told["win_rate"].low <= 0.5 <= told["win_rate"].high
    # 190 expected; three standard deviations of a binomial are 9.
    assert 181 <= covered <= 199


def test_a_judge_of_order_alone_is_exposed() -> None:
    told = win_rate(PROMPTS, answers(0), answers(1), order_only, resamples=100)
    assert (told["win_rate"].value, told["ties"]) == (0.5, 1.0)
    assert (told["first_shown_wins"].value, told["flips"].value) == (1.0, 1.0)
    assert told["longer_wins"].low <= 0.5 <= told["longer_wins"].high


def test_a_judge_of_length_alone_is_exposed() -> None:
    told = win_rate(PROMPTS, answers(0, 24), answers(1), length_only, resamples=100)
    assert (told["longer_wins"].value, told["first_shown_wins"].value, told["flips"].value) == (1.0, 0.5, 0.0)
    assert told["win_rate"].value == told["longer_is_ours"] > 0.65
    assert told["length_controlled"].value == pytest.approx(0.5, abs=0.1)


def test_an_honest_judge_has_neither_bias() -> None:
    told = win_rate(PROMPTS, answers(0, 24), answers(1), by_score(quality), resamples=100)
    assert (told["first_shown_wins"].value, told["flips"].value) == (0.5, 0.0)
    assert told["longer_wins"].low < 0.5 < told["longer_wins"].high
    assert told["length_controlled"].low < told["win_rate"].value < told["length_controlled"].high


def test_a_judge_that_is_biased_in_part() -> None:
    def mixed(prompts: Sequence[Any], first: Sequence[str], second: Sequence[str]) -> list[float]:
        # Prefers the better one; but where they are near each other, what it is shown first.
        gaps = np.array(quality(prompts, first)) - np.array(quality(prompts, second))
        return [1.0 if abs(gap) < 0.5 else float(gap > 0) for gap in gaps]

    told = win_rate(PROMPTS, answers(0), answers(1), mixed, resamples=100)
    near = np.mean(np.abs(np.array(quality(PROMPTS, answers(0))) - np.array(quality(PROMPTS, answers(1)))) < 0.5)
    assert told["flips"].value == told["ties"] == pytest.approx(near)
    assert told["first_shown_wins"].value == pytest.approx(0.5 + near / 2)


def test_what_is_undecided_is_named() -> None:
    def judge(prompts: Sequence[Any], first: Sequence[str], second: Sequence[str]) -> list[float | None]:
        return [None if prompt == "b" else float(a > b) for prompt, a, b in zip(prompts, first, second, strict=True)]

    told = win_rate(["a", "b", "c"], ["2", "2", ""], ["1", "1", "1"], judge, resamples=20)
    assert (told["undecided"], told["undecided_prompts"], told["empty_answers"]) == (1, ["b"], 1)
    assert told["win_rate"].value == 0.5
    assert (told["if_undecided_lose"], told["if_undecided_win"]) == (pytest.approx(1 / 3), pytest.approx(2 / 3))
    nan = win_rate(["a"], ["x"], ["y"], by_score(lambda prompts, texts: [float("nan")] * len(texts)))
    assert nan["undecided"] == 1
    assert np.isnan(nan["win_rate"].value)
    with pytest.raises(ValueError, match="the judge gave"):
        win_rate(["a"], ["x"], ["y"], lambda prompts, first, second: [0.7])


def test_planted_biases_are_run_on_the_same_answers() -> None:
    told = planted_biases(PROMPTS, answers(0), answers(1), resamples=50)
    assert set(told) == {"order_only", "length_only"}
    assert told["length_only"]["win_rate"].value == told["length_only"]["longer_is_ours"]
    same = planted_biases(["a", "b"], ["x", "y"], ["x", "y"], resamples=20)
    assert same["length_only"]["ties"] == 1.0
