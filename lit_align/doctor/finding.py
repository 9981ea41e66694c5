"""What a check of the doctor found."""

from __future__ import annotations

from typing import Literal, NamedTuple

Level = Literal["ok", "look", "wrong"]


class Finding(NamedTuple):
    """What a check found.

    Attributes:
        level: ok; look, which may be meant; or wrong, which spoils the run.
        check: its name.
        says: what was found, in numbers, and the way out where one is needed.
    """

    level: Level
    check: str
    says: str

    def __str__(self) -> str:
        return f"{self.level:5}  {self.check:11}  {self.says}"
