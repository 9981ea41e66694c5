"""Mixtures that change in the course of training: a function of seed and number, exact in each phase, resumable."""

import itertools
import json
import logging
from collections import Counter
from types import SimpleNamespace

import pytest
from data.fuzz import fuzz
from hypothesis import given
from hypothesis import strategies as st

from lit_align.data.instruction import InstructionDataModule
from lit_align.data.mixture import Phase, PhasedOrder, Timeline
from lit_align.data.prompt import PromptDataModule
from lit_align.data.source import Source, labels

PHASES = [Phase(0, [1.0, 0.0]), Phase(30, [0.5, 0.5]), Phase(37, [1.0, 3.0])]


def order(seed: int = 0) -> PhasedOrder:
    return PhasedOrder([range(9), range(100, 104)], PHASES, seed)


def stream(order: PhasedOrder, count: int, start: int = 0) -> list[tuple[int, int]]:
    return [order[n] for n in range(start, start + count)]


def shown(refs: list[tuple[int, int]]) -> list[int]:
    return [sum(source == s for source, _ in refs) for s in range(2)]


def test_every_phase_has_its_mixture() -> None:
    refs = stream(order(), 200)
    assert shown(refs[:30]) == [30, 0]
    assert shown(refs[30:37]) in ([4, 3], [3, 4])
    # Blocks of 13 examples, 3.25 and 9.75 of each: what rounding takes in three of them comes with the other.
    blocks = [shown(refs[start : start + 13]) for start in range(37, 180, 13)]
    assert blocks == ([[3, 10], [4, 9], [3, 10], [3, 10]] * 3)[:11]
    assert [order().counts(p, end).tolist() for p, end in ((0, 30), (1, 37), (2, 50), (2, 100))] == [
        shown(refs[:30]), shown(refs[30:37]), shown(refs[37:50]), shown(refs[37:100]),
    ]  # fmt: skip


# Kills: the same rounding in every block.
def test_a_small_share_comes_in_its_turn() -> None:
    made = PhasedOrder(
        [range(6), range(100, 103), range(200, 201)], [Phase(0, [97.0, 2.0, 1.0]), Phase(1005, [1] * 3)], 0
    )
    assert made.counts(0, 1000).tolist() == [970, 20, 10]
    refs = stream(made, 1005)
    assert [sum(source == s for source, _ in refs[:1000]) for s in range(3)] == [970, 20, 10]
    for source in range(3):  # each of its items in turn, over blocks and phases
        drawn = [item for s, item in stream(made, 1100) if s == source]
        assert drawn == made._draw(source, 0, len(drawn)).tolist()


WEIGHTS = st.lists(st.integers(0, 5), min_size=3, max_size=3).filter(any)


@fuzz
@given(
    st.lists(st.integers(1, 15), min_size=3, max_size=3),
    st.lists(st.tuples(st.integers(1, 40), WEIGHTS), min_size=1, max_size=4),
    st.integers(0, 3),
)
def test_proportions_hold_at_every_place_and_nothing_repeats_before_all_was_used(sizes, told, seed) -> None:
    begins = [0, *itertools.accumulate(length for length, _ in told)]
    phases = [Phase(begin, [float(w) for w in weights]) for begin, (_, weights) in zip(begins, told, strict=False)]
    made = PhasedOrder([range(size) for size in sizes], [*phases, Phase(begins[-1], [1.0] * 3)], seed)
    refs = stream(made, begins[-1])
    for phase, end in zip(phases, begins[1:], strict=True):
        for start in range(phase.begin, end, len(made)):
            block = refs[start : min(start + len(made), end)]
            for n, source in itertools.product(range(len(block) + 1), range(3)):
                share = phase.weights[source] / sum(phase.weights)
                off = sum(s == source for s, _ in block[:n]) - share * n
                assert abs(off) < (1 if n == len(block) else 4)
    for source in range(3):
        drawn = [item for s, item in refs if s == source]
        assert drawn == made._draw(source, 0, len(drawn)).tolist()


def test_the_order_is_a_function_of_seed_and_number() -> None:
    straight = stream(order(), 120)
    again = order()
    places = [119, 0, 36, 37, 30, 29, 64, 3, 90, 38]
    assert [again[n] for n in places] == [straight[n] for n in places]
    assert stream(order(), 60, 50) == straight[50:110]
    assert stream(order(1), 120) != straight
    # Known for ever: a resumed run of another version must find the same order.
    assert stream(order(), 6, 28) == KNOWN


@pytest.mark.parametrize(
    ("phases", "says"),
    [
        ([Phase(0, [1.0, 0.0]), Phase(5, [0.0, 0.0])], "one must be positive"),
        ([Phase(0, [1.0, -1.0])], "must not be negative"),
        ([Phase(0, [1.0, 0.0]), Phase(5, [0.0, 1.0])], "a source with a weight has no examples"),
    ],
)
def test_phases_that_make_no_mixture(phases: list[Phase], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        PhasedOrder([range(3), range(3 if "has no" not in says else 0)], phases, 0)


def run(**options) -> SimpleNamespace:
    """What a Trainer says of how far it trains."""
    defaults = {"max_epochs": -1, "max_steps": -1, "limit_train_batches": 1.0, "accumulate_grad_batches": 1}
    return SimpleNamespace(**{**defaults, "world_size": 1, "global_rank": 0, **options})


@pytest.mark.parametrize(
    ("trainer", "begins", "examples", "end"),
    [
        (None, [0, 0.5, 3], [0, 20, 12], 40),  # an epoch of 10 batches of 4
        (run(max_epochs=3), [0.5, 0.9, 11], [60, 108, 44], 120),
        (run(max_steps=8), [0.25, 0.5], [8, 16], 32),
        (run(max_steps=8, max_epochs=3), [0.5], [16], 32),
        (run(max_steps=800, max_epochs=3), [0.5], [60], 120),
        (run(max_epochs=3, limit_train_batches=4), [0.5], [24], 48),
        (run(max_epochs=3, limit_train_batches=0.5), [0.5, 0.6], [32, 36], 60),  # of 15 steps
        # Four batches a step; the third of an epoch has two.
        (run(max_epochs=2, accumulate_grad_batches=4), [0.5, 1, 3, 5], [40, 16, 40, 72], 80),
        # Two optimizer steps a batch.
        (run(max_steps=8, lightning_module=SimpleNamespace(optimizer_steps_per_batch=2)), [0.5, 6], [8, 12], 16),
        (run(), [0, 7], [0, 28], None),
    ],
)
def test_shares_and_steps_become_examples(trainer, begins, examples, end) -> None:
    time = Timeline(trainer, 10, 4)
    assert [time.example(begin) for begin in begins] == examples
    assert time.end == end


def test_a_share_of_a_run_without_an_end() -> None:
    with pytest.raises(ValueError, match=r"changes after 90% of training .* set trainer.max_epochs or trainer.max_ste"):
        Timeline(run(), 10, 4).example(0.9)


@pytest.fixture
def prompts(write, tokenizer_folder: str):
    def made(trainer=None, weights=None, **options) -> PromptDataModule:
        weights = weights or [[(0, 3.0), (0.5, 1.0)], [(0.5, 1.0)]]
        train = [
            Source(write(f"{name}.jsonl", [{"prompt": f"{name}{i}"} for i in range(count)]), weight=weight)
            for (name, count), weight in zip((("a", 12), ("b", 4)), weights, strict=True)
        ]
        data = PromptDataModule(tokenizer_folder, train, **{"batch_size": 4, "val_fraction": 0.0, **options})
        data.trainer = trainer
        data.prepare_data()
        data.setup("fit")
        return data

    return made


def read(data: PromptDataModule, batches: int) -> list[list[str]]:
    epochs = itertools.chain.from_iterable(data.train_dataloader() for _ in range(10))
    return [[row["prompt"] for row in batch.rows] for batch in itertools.islice(epochs, batches)]


def test_a_run_goes_from_one_mixture_to_the_other_and_says_so(prompts, caplog) -> None:
    with caplog.at_level(logging.INFO):
        batches = read(prompts(run(max_steps=10)), 10)
    first, second = ([row[0] for batch in part for row in batch] for part in (batches[:5], batches[5:]))
    assert Counter(first) == {"a": 20}
    assert Counter(second) == {"a": 10, "b": 10}
    told = [record.getMessage() for record in caplog.records if record.getMessage().startswith("mixture")]
    assert told == [
        "mixture of examples 0 to 20: a 20 (100.0%, each 1.7 times), b 0 (0.0%)",
        "mixture of examples 20 to 40: a 10 (50.0%), b 10 (50.0%, each 2.5 times)",
        "mixture in all: a 30 (75.0%, each 2.5 times), b 10 (25.0%, each 2.5 times)",
    ]
    caplog.clear()
    with caplog.at_level(logging.INFO):
        prompts(run(max_steps=10), weights=[1.0, 3.0])
        prompts(run(), weights=[1.0, [(7, 3.0)]])
        prompts(run(max_steps=5), weights=[1.0, [(7, 3.0)]])
        prompts(run(max_steps=5), weights=[None, None])
    told = [record.getMessage() for record in caplog.records if record.getMessage().startswith("mixture")]
    assert told == [
        "mixture of an epoch: a 4 (25.0%), b 12 (75.0%, each 3.0 times)",
        "mixture of examples 0 to 28: a 28 (100.0%, each 2.3 times), b 0 (0.0%)",
        "mixture from example 28 on, by weight: a 1, b 3",
        "mixture of examples 0 to 20: a 20 (100.0%, each 1.7 times), b 0 (0.0%)",
        "mixture from example 28 on: never, as training ends after 20 examples",
        "mixture in all: a 20 (100.0%, each 1.7 times), b 0 (0.0%)",
    ]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_resumed_is_as_uninterrupted(prompts, num_workers: int) -> None:
    options = {"trainer": run(max_steps=10), "num_workers": num_workers}
    straight = read(prompts(**options), 10)
    data = prompts(**options)
    seen = read(data, 6)
    again = prompts(**options)
    again.load_state_dict(json.loads(json.dumps(data.state_dict())))
    assert seen + read(again, 4) == straight


def test_phases_that_moved_do_not_resume(prompts) -> None:
    state = prompts(run(max_steps=10)).state_dict()
    with pytest.raises(ValueError, match=r"began at examples \[0, 20\] and now would at \[0, 40\]: leave the length"):
        prompts(run(max_steps=20)).load_state_dict(state)
    with pytest.raises(ValueError, match=r"began at examples \[\] and now would at \[0, 20\]"):
        prompts(run(max_steps=10)).load_state_dict({"batches": 3})
    # At steps they stay where they are.
    steps = [1.0, [(7, 3.0)]]
    prompts(run(max_steps=20), weights=steps).load_state_dict(prompts(run(max_steps=10), weights=steps).state_dict())


def test_two_processes_see_the_phases_at_the_same_step(prompts) -> None:
    alone = read(prompts(run(max_steps=10)), 10)
    parts = [read(prompts(run(max_steps=10, world_size=2, global_rank=r), batch_size=2), 10) for r in range(2)]
    assert [sorted(one + other) for one, other in zip(*parts, strict=True)] == [sorted(batch) for batch in alone]


def test_the_text_of_ppo_ptx_keeps_the_pace_of_the_prompts(prompts, write, tokenizer_folder: str) -> None:
    texts = [Source(write(f"{n}.jsonl", [{"text": n}] * 9), weight=w) for n, w in (("x", [(0, 1)]), ("y", [(0.5, 1)]))]

    def made(epochs: int) -> PromptDataModule:
        ptx = InstructionDataModule(tokenizer_folder, texts, batch_size=2, val_fraction=0.0)
        return prompts(run(max_epochs=epochs), weights=[None, None], ptx=ptx)

    data = made(3)
    assert data.ptx._order.begins == [0, 12]  # 3 epochs of 4 batches: from the sixth on
    state = json.loads(json.dumps(data.state_dict()))
    made(3).load_state_dict(state)
    with pytest.raises(ValueError, match=r"began at examples \[0, 12\] and now would at \[0, 20\]: leave the length"):
        made(5).load_state_dict(state)
    with pytest.raises(ValueError, match=r"began at examples \[\] and now would at \[0, 12\]"):
        made(3).load_state_dict({"batches": 3})


@pytest.mark.parametrize("weight", [[], [(0.5, 1.0), (0.5, 2.0)], [(5, 1.0), (0.5, 2.0)], [(-1, 1.0)]])
def test_begins_ascend(weight) -> None:
    with pytest.raises(ValueError, match="the weight of x: begins must ascend from 0 or more"):
        Source("x", weight=weight)


def test_phases_need_every_weight(prompts) -> None:
    with pytest.raises(ValueError, match="give a weight to every source or to none"):
        prompts(run(max_steps=10), weights=[None, [(0, 1.0)]])


def test_labels_are_short_and_no_two_alike() -> None:
    sources = [Source("a/train.jsonl.gz"), Source("b/train.csv"), Source(hub="org/set"), Source("c", label="mine")]
    assert labels(sources) == ["train", "train-2", "set", "mine"]
    assert Source("c", label="mine", weight=[(0, 1.0)]).name == "c"


KNOWN = [(0, 0), (0, 2), (1, 102), (0, 6), (0, 8), (1, 101)]
