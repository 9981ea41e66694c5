import dataclasses
import itertools
import math
import random

import pytest

from lit_align.sandbox.annotators import Annotators
from lit_align.sandbox.gold import judge
from lit_align.sandbox.world import Prompt, World

WORLD = World(0)
ENTITY = WORLD.known[0]
PROMPT = Prompt(f"what is the colour of {ENTITY} ?", "fact", (ENTITY, "colour"), "train")
COLOUR = WORLD.facts[PROMPT.key].true
WRONG = next(colour for colour in WORLD.values["colour"] if colour != COLOUR)
RIGHT, HEDGED, IDK, FALSE = COLOUR, f"i think {COLOUR}", "i do not know .", WRONG  # gold 1, .8, -.2, -1


def rank(annotators: Annotators, answers: list[str], seed: int = 0) -> list[int]:
    return annotators.rank(WORLD, PROMPT, answers, [True] * len(answers), random.Random(seed))


@pytest.mark.parametrize(("slope", "answers", "gap"), [(1.0, [IDK, HEDGED], 1.0), (4.0, [HEDGED, RIGHT], 0.2)])
def test_better_answer_wins_as_bradley_terry_says(slope: float, answers: list[str], gap: float) -> None:
    wins = sum(rank(Annotators(slope=slope), answers, seed) == [1, 0] for seed in range(5_000))
    assert wins / 5_000 == pytest.approx(1 / (1 + math.exp(-slope * gap)), abs=0.025)


def test_rankings_follow_plackett_luce() -> None:
    answers, gold = [RIGHT, HEDGED, IDK], [1.0, 0.8, -0.2]
    strengths = [math.exp(2.0 * value) for value in gold]
    seen = [tuple(rank(Annotators(slope=2.0), answers, seed)) for seed in range(5_000)]
    for order in itertools.permutations(range(3)):
        best, second, last = (strengths[answer] for answer in order)
        expected = best / (best + second + last) * second / (second + last)
        ranks = tuple(order.index(answer) for answer in range(3))
        assert seen.count(ranks) / 5_000 == pytest.approx(expected, abs=0.025)


def test_without_noise_the_order_is_that_of_gold() -> None:
    assert rank(Annotators(slope=math.inf), [IDK, FALSE, RIGHT, HEDGED]) == [2, 3, 0, 1]


def test_ranks_are_a_permutation_unless_texts_are_identical() -> None:
    for seed in range(200):
        assert sorted(rank(Annotators(), [IDK, FALSE, RIGHT, HEDGED], seed)) == [0, 1, 2, 3]
        first, other, again, last = rank(Annotators(), [RIGHT, FALSE, RIGHT, IDK], seed)
        assert first == again
        assert sorted([first, other, last]) == [0, 1, 2]
    # Equal gold is not a tie: annotators always prefer one text to another.
    assert sorted(rank(Annotators(), ["please", "yesterday"])) == [0, 1]


def test_length_bias_flips_a_pair() -> None:
    answers = [RIGHT, FALSE + " please" * 30]
    assert rank(Annotators(slope=math.inf), answers) == [0, 1]
    assert rank(Annotators(slope=math.inf, length_bias=0.05), answers) == [0, 1]
    assert rank(Annotators(slope=math.inf, length_bias=0.12), answers) == [1, 0]


def test_utility_by_hand() -> None:
    biased = Annotators(length_bias=0.12, confidence_bias=0.3, idk_bias=0.4)

    def utility(answer: str) -> float:
        return biased.utility(judge(WORLD, PROMPT, answer, finished=True))

    assert utility(RIGHT) == pytest.approx(1.0 + 0.12)
    assert utility("certainly ! " + RIGHT) == pytest.approx(1.0 + 3 * 0.12 + 0.3)
    assert utility(HEDGED) == pytest.approx(0.8 + 3 * 0.12 - 0.3)
    assert utility("certainly ! " + HEDGED) == pytest.approx(0.8 + 5 * 0.12)
    assert utility(IDK) == pytest.approx(-0.2 + 5 * 0.12 - 0.4)


def test_unbiased_annotators_like_gold_and_see_unfinished_answers() -> None:
    unfinished = judge(WORLD, PROMPT, RIGHT, finished=False)
    assert Annotators().utility(unfinished) == unfinished.total == pytest.approx(0.7)
    noiseless = Annotators(slope=math.inf)
    assert noiseless.rank(WORLD, PROMPT, [RIGHT, HEDGED], [False, True], random.Random(0)) == [1, 0]


def test_same_random_state_gives_same_ranks() -> None:
    assert rank(Annotators(slope=0.5), [RIGHT, HEDGED, IDK], 7) == rank(Annotators(slope=0.5), [RIGHT, HEDGED, IDK], 7)


def test_defaults_and_bounds() -> None:
    assert dataclasses.astuple(Annotators()) == (0.0, 0.0, 0.0, 4.0)
    with pytest.raises(ValueError, match="slope"):
        Annotators(slope=0.0)


def test_a_draw_of_zero_is_survived() -> None:
    class Zero(random.Random):
        def expovariate(self, lambd: float = 1.0) -> float:
            return 0.0

    assert sorted(Annotators().rank(WORLD, PROMPT, [RIGHT, FALSE], [True, True], Zero())) == [0, 1]
