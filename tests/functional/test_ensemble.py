"""One score out of several: hand-computed values, gradients, and what does not matter.

A mutant that a test was seen to kill is named above it.
"""

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from lit_align.functional.ensemble import mean_score, uncertainty_weighted_score, worst_case_score

SCORES = torch.tensor([[1.0, 2.0, -1.0], [3.0, 2.0, 0.0], [5.0, 2.0, -2.0]], dtype=torch.float64)
RULES: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": mean_score,
    "minimum": worst_case_score,
    "uncertainty": lambda score_MQ: uncertainty_weighted_score(score_MQ, 0.3),
}


# Kills: median for mean; maximum for minimum; deviation for variance; divided by M - 1; penalty added.
@pytest.mark.parametrize(
    ("rule", "expected"),
    # Variances 8/3, 0 and 2/3.
    [("mean", [3.0, 2.0, -1.0]), ("minimum", [1.0, 2.0, -2.0]), ("uncertainty", [3.0 - 0.8, 2.0, -1.0 - 0.2])],
)
def test_by_hand(rule: str, expected: list[float]) -> None:
    assert_close(RULES[rule](SCORES), torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("rule", RULES)
def test_gradients_are_those_of_finite_differences(rule: str) -> None:
    score_MQ = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(RULES[rule], score_MQ)


@pytest.mark.parametrize("rule", RULES)
def test_members_have_no_order_a_shift_shifts_and_agreement_is_the_score(rule: str) -> None:
    for order in itertools.permutations(range(3)):
        assert_close(RULES[rule](SCORES[list(order)]), RULES[rule](SCORES))
    assert_close(RULES[rule](SCORES + 7.0), RULES[rule](SCORES) + 7.0)
    assert_close(RULES[rule](SCORES[:1].expand(5, 3)), SCORES[0])
    # No rule is above the mean.
    assert (RULES[rule](SCORES) <= mean_score(SCORES) + 1e-12).all()


def test_without_a_price_uncertainty_is_the_mean() -> None:
    assert_close(uncertainty_weighted_score(SCORES, 0.0), mean_score(SCORES))
