"""The treaty between data and modules: batches that are packed and share their prompts.

Preference, ranking and policy data repeat one prompt K times. A padded batch computes the prompt K times and then the
padding; here a row of tokens holds several examples, and an example is a tree: a shared prompt (the trunk) with K
continuations (the branches). A token attends to the earlier tokens of its own tree that lie in the trunk or in its own
branch, and positions in a branch continue from the trunk, so every sequence is computed as if it stood alone.

Everything downstream of the model is a flat list, so no loss and no metric ever sees padding.

Shape legend, used as a suffix of names everywhere in lit_align:

    R rows   N tokens a row   S scored tokens   Q sequences   E examples   P pairs   V vocabulary   H hidden size
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class Segment(NamedTuple):
    """A run of tokens and, for each token, whether it is scored (predicted by the model and counted in the loss)."""

    tokens: Sequence[int]
    scored: Sequence[bool]


class Example(NamedTuple):
    """A prompt with its continuations, as token ids.

    With no branches the trunk is the one sequence (supervised data). With K branches there are K sequences, each the
    trunk followed by one branch; the trunk of such a tree is never scored.
    """

    trunk: Segment
    branches: Sequence[Segment] = ()

    @property
    def num_tokens(self) -> int:
        """Tokens that the model computes when the prompt is shared."""
        return len(self.trunk.tokens) + sum(len(branch.tokens) for branch in self.branches)


class PackedBatch(NamedTuple):
    """Examples laid out in rows, with the scored tokens as flat lists.

    Attributes:
        tokens_RN: token ids; 0 where a row ends early.
        positions_RN: position of each token in its own sequence.
        tree_RN: which tree a token belongs to; -1 where a row ends early.
        branch_RN: 0 in a trunk, k in the k-th branch of its tree.
        source_S: index, into the R * N hidden states, of the state that predicts the scored token.
        target_S: the scored token's id.
        sequence_S: which sequence the scored token belongs to; ascending.
        last_Q: index, into the R * N hidden states, of each sequence's last token.
        example_Q: which example each sequence belongs to; ascending, 0 .. E - 1.
        origin_E: number of the data source that each example comes from; 0 where nobody says.
    """

    tokens_RN: Tensor
    positions_RN: Tensor
    tree_RN: Tensor
    branch_RN: Tensor
    source_S: Tensor
    target_S: Tensor
    sequence_S: Tensor
    last_Q: Tensor
    example_Q: Tensor
    origin_E: Tensor

    @property
    def num_sequences(self) -> int:
        """Q."""
        return self.example_Q.numel()

    @property
    def num_examples(self) -> int:
        """E; every example has at least one sequence."""
        return int(self.example_Q[-1]) + 1 if self.num_sequences else 0

    @property
    def num_scored(self) -> int:
        """S."""
        return self.target_S.numel()


class PreferenceBatch(NamedTuple):
    """Answers to compare: one example is one prompt, its sequences are the K answers.

    Attributes:
        packed: the tokens.
        rank_Q: rank of each answer among those of its prompt; lower is better, equal is a tie.
        margin_Q: how much better each answer is; the margin of a pair is the difference. 0 where the data has none.
        key_E: a hash of each example's tokens, for what is kept about it (`ReferenceTable`); None if nothing is.
        share_P: share of several people who prefer the first of each two answers to a prompt, a tie counting half; in
            the order 12, 13, ... 23, ... NaN where the ranks are all there is; None if they are for the whole batch.
        grade_Q: what the annotator gives each answer, higher is better; NaN where it has none, None if none has.
        mismatched: each prompt with the answers to another one, for the reference point of KTO; None unless asked for.
    """

    packed: PackedBatch
    rank_Q: Tensor
    margin_Q: Tensor
    key_E: Tensor | None = None
    share_P: Tensor | None = None
    grade_Q: Tensor | None = None
    mismatched: PackedBatch | None = None

    @property
    def every_grade_Q(self) -> Tensor:
        """The grade of every answer.

        Raises:
            ValueError: some have none.
        """
        answers = self.packed.num_sequences
        missing = answers if self.grade_Q is None else int(self.grade_Q.isnan().sum())
        if self.grade_Q is None or missing:
            raise ValueError(
                f"{missing} of {answers} answers in a batch have no grade to learn (loss: regression): give rows with "
                "`scores`, one for each completion, or choose another loss"
            )
        return self.grade_Q


class PromptBatch(NamedTuple):
    """Prompts to answer.

    Attributes:
        prompts: token ids of each prompt (a 1-D tensor), template and generation prompt included.
        rows: the row each prompt came from (its text, reference answer and other columns), for rewards.
        ptx: supervised or pretraining text to mix into the update (PPO-ptx), if the data module has any.
    """

    prompts: list[Tensor]
    rows: list[dict]
    ptx: PackedBatch | None = None


class Completion(NamedTuple):
    """A sampled answer.

    Attributes:
        tokens: ids, the stop token included if one was sampled.
        finished: whether it ended with a stop token, and not for want of room.
        logps: what the engine says were the log-probabilities that it drew each token with, in nats; None if it drew
            none (temperature 0) or does not say.
    """

    tokens: list[int]
    finished: bool
    logps: list[float] | None = None


class Rollout(NamedTuple):
    """Sampled answers, one entry per sequence; the answers to one prompt stand together.

    Attributes:
        prompts: token ids of each sequence's prompt.
        rows: the row each prompt came from.
        completions: the answers as tokens.
        texts: the answers as text, special tokens left out.
        samples: answers per prompt.
    """

    prompts: list[Tensor]
    rows: list[dict]
    completions: list[Completion]
    texts: list[str]
    samples: int

    @property
    def num_sequences(self) -> int:
        """Q."""
        return len(self.completions)

    def pick(self, sequences: Sequence[int]) -> Rollout:
        """Some of the sequences; all answers to a prompt or none, for `examples` to share it."""
        return Rollout(
            [self.prompts[q] for q in sequences],
            [self.rows[q] for q in sequences],
            [self.completions[q] for q in sequences],
            [self.texts[q] for q in sequences],
            self.samples,
        )

    def split(self, sequences: int | None) -> list[Rollout]:
        """The rollout in parts of so many sequences; None for one part."""
        if sequences is None:
            return [self]
        every = range(self.num_sequences)
        return [self.pick(every[first : first + sequences]) for first in range(0, self.num_sequences, sequences)]

    def tokens_by_prompt(self) -> list[int]:
        """Tokens of each prompt with all its answers, which share it."""
        answers = [len(completion.tokens) for completion in self.completions]
        starts = range(0, self.num_sequences, self.samples)
        return [len(self.prompts[q]) + sum(answers[q : q + self.samples]) for q in starts]

    def sampled_logps(self) -> list[float] | None:
        """Log-probabilities that tokens were drawn with, as `examples` has them; None if the engine does not say."""
        logps = [completion.logps for completion in self.completions]
        return None if None in logps else [logp for row in logps for logp in row or ()]

    def examples(self) -> list[Example]:
        """One example per prompt: the answers are its branches, every token of them scored."""
        examples = []
        for first in range(0, self.num_sequences, self.samples):
            ids = self.prompts[first].tolist()
            answers = [completion.tokens for completion in self.completions[first : first + self.samples]]
            branches = [Segment(tokens, [True] * len(tokens)) for tokens in answers]
            examples.append(Example(Segment(ids, [False] * len(ids)), branches))
        return examples
