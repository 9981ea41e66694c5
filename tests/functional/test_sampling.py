from unittest import mock

import torch

from lit_align.functional.sampling import draw


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# Kills: the wrong side of the search; a cumulative sum along the batch; one number for all rows.
def test_draws_are_distributed_as_they_should() -> None:
    probs = torch.tensor([[0.1, 0.0, 0.6, 0.3], [0.0, 0.5, 0.0, 0.5]])
    n = 40_000
    drawn = draw(probs.repeat(n, 1), seeded()).reshape(n, 2)
    for row, expected in enumerate(probs):
        share = torch.bincount(drawn[:, row], minlength=4) / n
        assert (share - expected).abs().max() < 4 * (0.25 / n) ** 0.5
        assert (share[expected == 0] == 0).all()
    assert (drawn[:, 0] == drawn[:, 1]).float().mean() < 0.5


def test_weights_need_not_add_up_to_one() -> None:
    probs = torch.rand(50, 9)
    assert torch.equal(draw(probs, seeded(3)), draw(probs * 7, seeded(3)))


# Kills: right=False, which takes the impossible first token at 0; the point not kept below the total.
def test_the_ends_of_the_interval_give_tokens_that_are_possible() -> None:
    probs = torch.tensor([[0.0, 0.0, 0.7, 0.3, 0.0]])
    for number, expected in ((0.0, 2), (1.0, 3), (0.6999, 2), (0.7001, 3)):
        with mock.patch("torch.rand", return_value=torch.full((1, 1), number, dtype=torch.float64)):
            assert draw(probs).tolist() == [expected]


# Kills: fp32 sums, in which what comes last among many has no weight of its own.
def test_small_probabilities_of_a_large_vocabulary_count() -> None:
    probs = torch.full((1, 200_000), 1e-8)
    probs[0, 0] = 1.0
    drawn = [draw(probs, seeded(seed)).item() for seed in range(4000)]
    rare = [token for token in drawn if token]
    assert 0 < len(rare) < 40
    assert len(set(rare)) == len(rare)


# Kills: a block too far; the mass before a block counted twice or left out; columns added at the end that can be drawn.
def test_blocks_change_nothing() -> None:
    probs = torch.rand(400, 1000, generator=seeded(1)) * (torch.rand(400, 1000, generator=seeded(2)) < 0.1)
    probs[:, 128:640], probs[:, 990:] = 0.0, 0.0
    uniform = torch.rand(400, 1, generator=seeded(), dtype=torch.float64)
    cumulative = probs.double().cumsum(-1)
    expected = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)[:, 0]
    drawn = draw(probs, seeded())
    assert (drawn == expected).float().mean() > 0.99  # but where rounding decides
    assert (probs.gather(1, drawn[:, None]) > 0).all()


# Kills: an index behind the last block, the last column of it, or the last token, which ends a CUDA context.
def test_rows_that_are_no_numbers_give_tokens_of_the_vocabulary() -> None:
    for size in (3, 128, 300):
        probs = torch.rand(4, size)
        good = draw(probs, seeded())
        probs[1], probs[2, -1] = torch.nan, torch.nan
        drawn = draw(probs, seeded())
        assert ((drawn >= 0) & (drawn < size)).all()
        assert drawn[[0, 3]].tolist() == good[[0, 3]].tolist()
        assert (draw(torch.full((4, size), torch.inf), seeded()) < size).all()
