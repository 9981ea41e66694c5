"""A model's own answers, scored by a reward, as data to train on: the best of each prompt, or the best and the worst.

Two steps of a pipeline between `predict`, which samples K answers to a prompt, and `fit`. With `BestOfN` that is
rejection sampling (RAFT: Dong et al. 2023, "RAFT: Reward rAnked FineTuning for Generative Foundation Model Alignment",
algorithm 1; best-of-n: Stiennon et al. 2020, Gao et al. 2022), with `BestWorstPairs` iterative DPO (Xiong et al. 2023,
"Iterative Preference Learning from Human Feedback", algorithm 2; Dong et al. 2024, "RLHF Workflow", section 3.1, which
takes the best and the worst of the K).
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from lit_align.data.chat import ChatEncoder
from lit_align.data.files import open_files, read_rows
from lit_align.data.messages import prompt_of, tools_of
from lit_align.data.rows import JUDGEMENTS, BadField, BadRow, Row, Tally, list_of, text_of
from lit_align.data.source import OnBadRow
from lit_align.data.strings import Template
from lit_align.models import load_tokenizer
from lit_align.models.load import device_of
from lit_align.rewards import Reward
from lit_align.types import Completion, Rollout
from lit_align.utils.disk import replacing
from lit_align.utils.display import say


class Sampled(NamedTuple):
    """A prompt with its K answers: where it stands, its row, and both as tokens."""

    origin: str
    number: int
    row: Row
    prompt: Tensor
    completions: list[Completion]

    def bad(self, problem: object) -> BadRow:
        """Something wrong with it."""
        return BadRow(self.origin, self.number, problem)


class Selection:
    """Base: reads sampled answers, scores them, and writes what a subclass chooses, a row for each prompt.

    What is not chosen is counted, and the counts are figures of the stage.

    Args:
        completions: what `lit-align predict` wrote: rows of prompt, completions and finished.
        reward: what scores them: any `Reward`.
        tokenizer: folder of the model that answered.
        batch_size: answers scored together.
        on_bad_row: error, or skip to count and leave out a row that does not fit or cannot be scored.
        device: where the reward runs; auto for a GPU if there is one.
        template: of prompts that are plain text, as `data.template` of the run that sampled the answers.
    """

    file = ""

    def __init__(
        self,
        completions: str,
        reward: Reward,
        tokenizer: str,
        batch_size: int = 256,
        on_bad_row: OnBadRow = "error",
        device: str = "auto",
        template: Template = "auto",
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.completions = completions
        self.reward = reward
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.on_bad_row = on_bad_row
        self.device = device
        self.template: Template = template

    def choose(self, row: Row, scores: Sequence[float], tally: Tally) -> Row | None:
        """What to write of a prompt whose answers scored so; None, and why not in the tally, for nothing."""
        raise NotImplementedError(f"{type(self).__name__} must implement choose")

    def run(self, out: Path) -> dict[str, float]:
        """Write the file; return counts, and means over prompts of the mean, the best and the worst score.

        Raises:
            BadRow: a row that does not fit, or an answer whose score is no finite number; names file and row.
            ValueError: nothing was chosen; says why.
        """
        tokenizer = load_tokenizer(self.tokenizer)
        self.reward.load(tokenizer)
        self.reward.to(device_of(self.device))
        tally, sums = Tally(), dict.fromkeys(("score", "best_score", "worst_score"), 0.0)
        with replacing(out / self.file) as partial:
            with partial.open("w") as file:
                prompts = self._read(ChatEncoder(tokenizer, template=self.template), tally)
                for prompt, scores in tqdm(self._scored(prompts, tally), "scoring", delay=2, leave=False):
                    tally["scored"] += 1
                    for name, value in zip(sums, (sum(scores) / len(scores), max(scores), min(scores)), strict=True):
                        sums[name] += value
                    tally["all_the_same"] += max(scores) == min(scores)
                    if (chosen := self.choose(prompt.row, scores, tally)) is not None:
                        file.write(json.dumps(chosen) + "\n")
                        tally["written"] += 1
            say(f"{self.completions}: {tally}")
            if not tally["written"]:
                raise ValueError(f"{self.completions}: nothing to train on is left of {tally}")
        means = {name: total / tally["scored"] for name, total in sums.items()}
        return {**{name: float(count) for name, count in tally.items()}, **means}

    def _read(self, encoder: ChatEncoder, tally: Tally) -> Iterator[Sampled]:
        for name, handle in open_files(self.completions):
            for number, row in read_rows(name, handle):
                tally["prompts"] += 1
                try:
                    if isinstance(row, BadRow):
                        raise row
                    yield _sampled(name, number, row, encoder)
                except BadField as problem:
                    self._bad(BadRow(name, number, problem), tally)
                except BadRow as error:
                    self._bad(error, tally)

    def _bad(self, error: BadRow, tally: Tally) -> None:
        if self.on_bad_row == "error":
            raise error from None
        tally.skip(error)

    def _scored(self, prompts: Iterator[Sampled], tally: Tally) -> Iterator[tuple[Sampled, list[float]]]:
        """Every prompt with its answers' scores; a rollout has as many answers to each of its prompts."""
        for k, alike in itertools.groupby(prompts, key=lambda prompt: len(prompt.completions)):
            while batch := list(itertools.islice(alike, max(self.batch_size // k, 1))):
                yield from self._score(batch, tally)

    def _score(self, batch: list[Sampled], tally: Tally) -> Iterator[tuple[Sampled, list[float]]]:
        try:
            scores_Q = self._rewards(batch)
        except ValueError as error:
            if len(batch) == 1:
                self._bad(batch[0].bad(str(error).replace("\n", " ")), tally)
                return
            # Which of them it is: the one that cannot be scored alone either.
            for prompt in batch:
                yield from self._score([prompt], tally)
            return
        k = len(batch[0].completions)
        for prompt, scores in zip(batch, scores_Q.split(k), strict=True):
            yield prompt, scores.tolist()

    @torch.no_grad()
    def _rewards(self, batch: list[Sampled]) -> Tensor:
        return self.reward(_rollout(batch))


class BestOfN(Selection):
    """Writes `best.jsonl`, prompt and completion: of each prompt's answers the one that scores highest.

    Of answers that score the same it is the first, which was drawn like the others. One that was cut for want of room
    is not chosen: imitated, it would end where nothing ends. Nor is an empty one: there is nothing in it to imitate.

    Args:
        least: leave a prompt out whose best answer scores less: 1 keeps what a verifier found right.
        options: those of `Selection`.
    """

    file = "best.jsonl"

    def __init__(
        self, completions: str, reward: Reward, tokenizer: str, least: float | None = None, **options: Any
    ) -> None:
        super().__init__(completions, reward, tokenizer, **options)
        self.least = least

    def choose(self, row: Row, scores: Sequence[float], tally: Tally) -> Row | None:
        """See `Selection`."""
        answers = row["completions"]
        whole = [k for k, end in enumerate(row["finished"]) if end and answers[k].strip()]
        if not whole:
            tally["all_cut_or_empty"] += 1
            return None
        best = max(whole, key=lambda k: scores[k])
        if self.least is not None and scores[best] < self.least:
            tally["below_the_least_score"] += 1
            return None
        tally["ties"] += _tie(best, answers, scores)
        return {**_prompt(row), "completion": answers[best], "score": scores[best]}


class BestWorstPairs(Selection):
    """Writes `pairs.jsonl`, prompt, chosen, rejected and margin: of each prompt's answers the best and the worst.

    The margin is the difference of their scores. Of answers that score the same it is the first, and where all do there
    is no pair. `finished` says of each of the two whether it ended by itself; one that was cut gets no stop token.

    Args:
        least_margin: leave a prompt out whose two are closer.
        options: those of `Selection`.
    """

    file = "pairs.jsonl"

    def __init__(
        self, completions: str, reward: Reward, tokenizer: str, least_margin: float = 0.0, **options: Any
    ) -> None:
        super().__init__(completions, reward, tokenizer, **options)
        self.least_margin = least_margin

    def choose(self, row: Row, scores: Sequence[float], tally: Tally) -> Row | None:
        """See `Selection`."""
        best, worst = (max(range(len(scores)), key=lambda k: sign * scores[k]) for sign in (1, -1))
        margin = scores[best] - scores[worst]
        if margin == 0:
            return None  # counted as all the same
        if margin < self.least_margin:
            tally["below_the_least_margin"] += 1
            return None
        answers = row["completions"]
        tally["ties"] += _tie(best, answers, scores) or _tie(worst, answers, scores)
        return {
            **_prompt(row),
            "chosen": answers[best],
            "rejected": answers[worst],
            "margin": margin,
            "finished": [row["finished"][best], row["finished"][worst]],
        }


def _tie(k: int, answers: Sequence[str], scores: Sequence[float]) -> bool:
    """Whether another answer scores as answer k does; the same text a second time is no other."""
    return any(score == scores[k] and text != answers[k] for text, score in zip(answers, scores, strict=True))


def _prompt(row: Row) -> Row:
    """What is written of a prompt's row: nothing that was said of other answers."""
    return _without(row, JUDGEMENTS)


def _without(row: Row, names: Sequence[str]) -> Row:
    return {name: value for name, value in row.items() if name not in names}


def _sampled(name: str, number: int, row: Row, encoder: ChatEncoder) -> Sampled:
    """A row of the file, checked.

    Raises:
        BadField: what is wrong with it.
    """
    prompt, tools = prompt_of(row), tools_of(row)
    answers = list_of(row, "completions")
    texts = [text_of({f"completions[{k}]": text}, f"completions[{k}]") for k, text in enumerate(answers)]
    finished = list_of({"finished": [True] * len(texts), **row}, "finished")
    if len(finished) != len(texts) or not all(isinstance(end, bool) for end in finished):
        raise BadField("finished", f"is {finished!r:.40}, expected true or false for each of {len(texts)} completions")
    tokens = [encoder.answer(prompt, text, end, tools).tokens for text, end in zip(texts, finished, strict=True)]
    completions = [Completion(list(ids), end) for ids, end in zip(tokens, finished, strict=True)]
    return Sampled(
        name, number, {**row, "finished": finished}, torch.tensor(encoder.prompt(prompt, tools)), completions
    )


def _rollout(batch: list[Sampled]) -> Rollout:
    """As a reward gets it; rows without the answers, as in training."""
    k = len(batch[0].completions)
    rows = [_without(prompt.row, ("completions", "finished")) for prompt in batch]
    return Rollout(
        [prompt.prompt for prompt in batch for _ in range(k)],
        [row for row in rows for _ in range(k)],
        [completion for prompt in batch for completion in prompt.completions],
        [text for prompt in batch for text in prompt.row["completions"]],
        k,
    )
