from __future__ import annotations

import torch

from lit_align.functional.gather_rows import read_rows

ROWS, WIDTH, READ = 64, 256, 4_096


# Kills: rows read in another order; a gradient that is lost where a row is read again.
def test_rows_are_those_of_an_index() -> None:
    seeded = torch.Generator().manual_seed(0)
    matrix = torch.randn(ROWS, 3, generator=seeded, dtype=torch.float64, requires_grad=True)
    read = torch.randint(0, ROWS, (2 * ROWS,), generator=seeded)
    weights = torch.randn(2 * ROWS, 3, generator=seeded, dtype=torch.float64)
    expected, got = matrix[read], read_rows(matrix, read)
    assert torch.equal(got, expected)
    gradients = [torch.autograd.grad((rows * weights).sum(), matrix)[0] for rows in (expected, got)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-12)


# Kills: a gradient that threads add up as they come.
def test_the_gradient_is_the_same_to_the_bit_on_two_threads() -> None:
    seeded, before = torch.Generator().manual_seed(0), torch.get_num_threads()
    matrix = torch.randn(ROWS, WIDTH, generator=seeded, requires_grad=True)
    read = torch.randint(0, ROWS, (READ,), generator=seeded)
    weights = torch.randn(READ, WIDTH, generator=seeded)
    torch.set_num_threads(2)
    try:
        first, *others = (torch.autograd.grad((read_rows(matrix, read) * weights).sum(), matrix)[0] for _ in range(10))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(first, other) for other in others)
