"""A Python function as a reward."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lit_align.rewards.patience import Attempts, TryAgain, patiently, within
from lit_align.rewards.protocol import Reward, checked, named
from lit_align.types import Rollout


class FunctionReward(Reward):
    """Scores completions by a function `f(rows, completions) -> scores`.

    Args:
        function: takes the prompts' rows (dictionaries with `prompt`, `reference` and any other column of the data)
            and the completions as text, and returns one number for each. In YAML, its import path.
        batch_size: completions in a call; null for all of them at once.
        timeout: seconds that a call may take; null for no limit.
        retries: further attempts where the function raises an error or takes too long, as one that asks a service may.
        pause: seconds before the first of them; doubled each time.
    """

    def __init__(
        self,
        function: Callable[[list[dict], list[str]], list[float]],
        batch_size: int | None = None,
        timeout: float | None = None,
        retries: int = 0,
        pause: float = 1.0,
    ) -> None:
        super().__init__()
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, or null, got {batch_size}")
        self.function = function
        self.batch_size, self.timeout, self.retries, self.pause = batch_size, timeout, retries, pause

    @property
    def label(self) -> str:
        """The function's name."""
        return getattr(self.function, "__name__", type(self.function).__name__)

    @property
    def title(self) -> str:
        """With the function's name."""
        return f"the reward function {self.label}"

    def forward(self, rollout: Rollout) -> Tensor:
        """Shape (Q,).

        Raises:
            ValueError: see `checked`.
            TimeoutError: it took too long; names the prompts.
            Exception: the function's own, with a note that names the prompts.
        """
        return torch.cat([self._scores(part) for part in rollout.split(self.batch_size)])

    def _scores(self, rollout: Rollout) -> Tensor:
        def call() -> list[float]:
            try:
                return within(self.timeout, lambda: self.function(rollout.rows, rollout.texts))
            except Exception as error:
                raise TryAgain(f"{type(error).__name__}: {error}") from error

        try:
            return checked(patiently(call, Attempts(self.title, self.retries, self.pause)), rollout, self.title)
        except TryAgain as last:
            said = f"{last}; the prompts: {named(rollout.rows)}"
            problem = getattr(last.__cause__, "__cause__", None)  # what the function raised the last time
        if isinstance(problem, TimeoutError):
            raise TimeoutError(said) from problem
        assert isinstance(problem, Exception)
        problem.add_note(said)
        raise problem
