"""Labels from a reward model: completions ranked by their scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lit_align.data.rows import Row, Tally
from lit_align.feedback.labels import write_rows
from lit_align.feedback.sampled import Selection
from lit_align.feedback.tasks import Task, label_for
from lit_align.models.network import Network
from lit_align.rewards.model import ModelReward


class RewardLabels(Selection):
    """Writes `labels.jsonl`: each task's completions, ranked by a reward.

    Args:
        annotator: the name that the labels get.
        options: those of `Selection`.
    """

    file = "labels.jsonl"

    def __init__(self, *args: Any, annotator: str = "reward", **options: Any) -> None:
        super().__init__(*args, **options)
        self.annotator = annotator

    def choose(self, row: Row, scores: Sequence[float], tally: Tally) -> Row | None:
        """See `Selection`."""
        task = Task(
            row["task"], row["prompt"], tuple(row["completions"]), row.get("sources") or [], tuple(row["finished"]),
            row.get("category"), row.get("tools"),
        )  # fmt: skip
        return label_for(task, self.annotator, [-score for score in scores]).row()


def reward_labels(tasks: Sequence[Task], folder: str, out: Path) -> Path:
    """Rank tasks by the reward model in a folder; return the file of labels in `out`.

    Raises:
        ValueError: there is no such model, or a task cannot be scored.
    """
    rows = [{**asdict(task), "task": task.id} for task in tasks]
    asked = out / "tasks.jsonl"
    write_rows(asked, [{k: v for k, v in row.items() if v is not None and k not in ("id", "answer")} for row in rows])
    reward = ModelReward(Network(folder))
    RewardLabels(str(asked), reward, folder, annotator=f"reward:{Path(folder).name}").run(out)
    return out / RewardLabels.file
