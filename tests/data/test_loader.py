import itertools
from collections.abc import Callable

import pytest
import torch

from lit_align.data.loader import Loader, Position


def batch(number: int) -> list[int]:
    return [number, number * number]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_epoch_begins_where_training_stands(num_workers: int) -> None:
    position = Position()
    loader = Loader(batch, 5, num_workers, position)
    assert len(loader) == 5
    assert [number for number, _ in loader] == [0, 1, 2, 3, 4]
    assert position.batches == 5
    assert [square for _, square in loader] == [25, 36, 49, 64, 81]
    position.batches = 3
    assert [number for number, _ in loader] == [3, 4, 5, 6, 7]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_batch_counts_as_taken_when_it_is_handed_out(num_workers: int) -> None:
    position = Position()
    seen = []
    for number, _ in Loader(batch, 4, num_workers, position):
        # Workers fetch ahead; the position does not.
        seen.append((number, position.batches))
        if number == 2:
            break
    assert seen == [(0, 1), (1, 2), (2, 3)]
    assert position.batches == 3


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_global_random_state_is_left_alone(num_workers: int) -> None:
    loader = Loader(batch, 3, num_workers, Position())
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    list(loader)
    list(itertools.islice(loader, 1))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_evaluation_begins_at_the_beginning_each_time() -> None:
    loader = Loader(batch, 3)
    assert list(loader) == list(loader) == [[0, 0], [1, 1], [2, 4]]
    assert list(Loader(batch, 0)) == []


def test_what_lightning_asks_of_a_loader_that_resumes_in_mid_epoch() -> None:
    position = Position()
    loader = Loader(batch, 3, 0, position)
    next(iter(loader))
    assert loader.state_dict() == {"batches": 1}
    position.batches = 2  # as the data module restores it
    loader.load_state_dict({"batches": 7})
    assert loader.state_dict() == {"batches": 2}
    assert Loader(batch, 3).state_dict() == {"batches": 0}


def test_an_error_in_a_batch_is_not_hidden() -> None:
    with pytest.raises(ZeroDivisionError):
        list(Loader(lambda number: 1 // (number - 1), 3))


def lost(problem: type[Exception]) -> None:
    raise problem("by a peer")


class Torn:
    """A batch that breaks where it is received, as tensors do whose worker was killed after it had sent their names."""

    def __init__(self, problem: type[Exception]) -> None:
        self.problem = problem

    def __reduce__(self) -> tuple[Callable[[type[Exception]], None], tuple[type[Exception]]]:
        return lost, (self.problem,)


@pytest.mark.parametrize("problem", [ConnectionResetError, EOFError])
def test_a_worker_lost_while_it_hands_over_a_batch_is_told_as_one(problem: type[Exception]) -> None:
    with pytest.raises(RuntimeError, match=f"^DataLoader worker was lost .*{problem.__name__}"):
        list(Loader(lambda number: Torn(problem), 3, 1))
    # The data may break so themselves: that is theirs to say.
    for num_workers in (0, 1):
        with pytest.raises(problem, match="by a peer"):
            list(Loader(lambda number: lost(problem), 3, num_workers))
