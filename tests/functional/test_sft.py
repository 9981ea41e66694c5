"""The supervised loss.

A mutant that a test was seen to kill is named above it.
"""

import torch

from lit_align.functional.sft import sft_loss


# Kills: mean for sum; sign; detach; count + 1.
def test_sum_and_count_by_hand() -> None:
    logps_S = torch.tensor([-1.0, -2.5, -0.5], requires_grad=True)
    total, count = sft_loss(logps_S)
    assert (total.item(), count) == (4.0, 3)
    total.backward()
    assert logps_S.grad is not None
    assert logps_S.grad.tolist() == [-1.0, -1.0, -1.0]


# Kills: mean for sum (a mean of means weighs the token of the short micro-batch three times).
def test_micro_batches_add_up_to_the_batch() -> None:
    logps_S = torch.tensor([-4.0, -1.0, -1.0, -1.0], dtype=torch.float64)
    whole, count = sft_loss(logps_S)
    parts = [sft_loss(part) for part in (logps_S[:1], logps_S[1:])]
    assert whole == sum(total for total, _ in parts)
    assert count == sum(tokens for _, tokens in parts)
    assert whole / count == 1.75


def test_no_scored_token_is_a_zero_with_a_gradient() -> None:
    logps_S = torch.zeros(0, requires_grad=True)
    total, count = sft_loss(logps_S)
    assert (total.item(), count) == (0.0, 0)
    total.backward()
