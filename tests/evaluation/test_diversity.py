from __future__ import annotations

import numpy as np
import pytest

from lit_align.evaluation.diversity import distinct, diversity, overlap


def test_distinct_and_overlap_by_hand() -> None:
    texts = ["a b c", "a b d", "x y z"]
    # ab bc | ab bd | xy yz
    assert distinct(texts) == pytest.approx(5 / 6)
    assert overlap(texts) == [0.5, 0.5, 0.0]
    assert distinct(["a"]) is np.nan or np.isnan(distinct(["a"]))
    assert distinct(["a b c d"], window=2) == 1.0


def test_a_collapsed_policy_differs_across_prompts_and_not_within() -> None:
    prompts = [n for n in range(20) for _ in range(4)]
    collapsed = [f"p{n} says word{n} and word{n}" for n in prompts]
    told = diversity(collapsed, prompts, resamples=50)
    assert (told["same_per_prompt"].value, told["overlap_per_prompt"].value) == (1.0, 1.0)
    assert told["overlap_across"].value == 0.0
    one_answer = diversity(["the same words always"] * 80, prompts, resamples=50)
    assert one_answer["overlap_across"].value == 1.0
    varied = diversity([f"a{i} b{i} c{i}" for i in range(80)], prompts, resamples=50)
    assert (varied["distinct_per_prompt"].value, varied["same_per_prompt"].value) == (1.0, 0.0)


def test_empty_answers_are_counted() -> None:
    told = diversity(["", "a b", "a b"], [0, 0, 1], resamples=20)
    assert told["answers_without_grams"] == 1
    assert told["overlap_across"].observations == 1
