"""Steps of pipelines that cost nothing: `call` stages name them by class_path."""

from __future__ import annotations

from pathlib import Path


class Write:
    """Writes `text.txt`: what its inputs hold, then its own words and seed. Counts how often it ran, in `runs.txt`.

    Args:
        words: its own.
        inputs: files of earlier stages.
        seed: written beside the words.
        breaks_at: stop with an error as long as this file is not there, with half of the work done.
        common: a figure named for the whole summary.
    """

    def __init__(
        self,
        words: list[str],
        inputs: list[str] | None = None,
        seed: int = 0,
        breaks_at: str | None = None,
        common: float | None = None,
    ) -> None:
        if not words:
            raise ValueError("words must not be empty")
        self.words = words
        self.inputs = inputs or []
        self.seed = seed
        self.breaks_at = breaks_at
        self.common = common

    def run(self, out: Path) -> dict[str, float]:
        """Write."""
        with (out / "runs.txt").open("a") as file:
            file.write("ran\n")
        if self.breaks_at is not None and not Path(self.breaks_at).exists():
            raise RuntimeError("interrupted")
        text = " ".join([*(Path(name).read_text() for name in self.inputs), *self.words, str(self.seed)])
        (out / "text.txt").write_text(text)
        figures = {"characters": float(len(text))}
        return figures if self.common is None else {**figures, "all/common": self.common}


class NoStep:
    """A class without `run`."""
