"""Simulated annotators: people who rank answers by gold, through noise and, if asked, through well-known biases.

Each answer gets a noisy utility u + Gumbel(0, 1) / slope. Sorting by it draws a ranking from the Plackett-Luce model
with strengths exp(slope * u): of two answers, the better one wins with probability sigmoid(slope * gap), as
Bradley-Terry assumes. The biases are those found in human labels: longer looks better, confident sounds right,
"i do not know" disappoints. All are 0 by default, so that any harm seen with them has a known cause.
"""

import math
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from lit_align.sandbox.gold import Judgement, judge
from lit_align.sandbox.world import Prompt, World


@dataclass(frozen=True)
class Annotators:
    """How the annotators feel about answers; a larger slope means less noise, and `math.inf` means none."""

    length_bias: float = 0.0
    confidence_bias: float = 0.0
    idk_bias: float = 0.0
    slope: float = 4.0

    def __post_init__(self) -> None:
        if not self.slope > 0:
            raise ValueError(f"slope must be positive, got {self.slope}")

    def utility(self, judgement: Judgement) -> float:
        """How much the annotators like an answer, before noise."""
        return (
            judgement.total
            + self.length_bias * judgement.words
            + self.confidence_bias * (judgement.certain - judgement.hedges)
            - self.idk_bias * judgement.says_unknown
        )

    def rank(
        self, world: World, prompt: Prompt, answers: Sequence[str], finished: Sequence[bool], rng: random.Random
    ) -> list[int]:
        """The rank of each answer: 0 is best. Answers of the same text cannot be told apart, so they share a rank."""
        finished_texts: dict[str, bool] = {}
        for answer, stopped in zip(answers, finished, strict=True):
            finished_texts[answer] = finished_texts.get(answer, False) or stopped
        liking = {
            text: self.utility(judge(world, prompt, text, stopped)) + _gumbel(rng) / self.slope
            for text, stopped in finished_texts.items()
        }
        best_first = sorted(liking, key=lambda text: -liking[text])
        return [best_first.index(answer) for answer in answers]


def _gumbel(rng: random.Random) -> float:
    """Minus the log of an exponential draw, which may be exactly zero."""
    return -math.log(max(rng.expovariate(1.0), sys.float_info.min))
