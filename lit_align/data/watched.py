"""Which columns of a file a reader looks at: the others are named once, so that none is dropped without a word."""

from __future__ import annotations

from collections.abc import ItemsView, ValuesView
from typing import Any

from lit_align.data.messages import TRAINED
from lit_align.data.rows import BadField, Row, Tally

# Columns of what is no text; a language model of text would answer without having seen it.
MEDIA = ("image", "images", "audio", "audios", "video", "videos")


class Watched(dict[str, Any]):
    """A row that remembers which of its fields were asked for, those of its turns included.

    Args:
        row: the row.
        seen: gets the names, as `messages[].role`.
        inside: what comes before the names.
    """

    def __init__(self, row: Row, seen: set[str], inside: str = "") -> None:
        super().__init__({name: _watched(value, seen, f"{inside}{name}") for name, value in row.items()})
        self.seen, self.inside = seen, inside

    def __getitem__(self, name: str) -> Any:
        self.seen.add(f"{self.inside}{name}")
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        """The field's value, or the default."""
        self.seen.add(f"{self.inside}{name}")
        return super().get(name, default)

    def items(self) -> ItemsView[str, Any]:  # type: ignore[override]
        """All of them: whoever asks for this takes the row whole."""
        self.seen.update(f"{self.inside}{name}" for name in self)
        return super().items()

    def values(self) -> ValuesView[Any]:  # type: ignore[override]
        """The same."""
        self.seen.update(f"{self.inside}{name}" for name in self)
        return super().values()


def _watched(value: Any, seen: set[str], name: str) -> Any:
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return [Watched(held, seen, f"{name}[].") if isinstance(held, dict) else held for held in value]
    return value


def watch(row: Row, tally: Tally) -> Watched:
    """A row whose columns are counted in the tally as used once a reader has asked for them.

    Raises:
        BadField: it holds images, audio or video.
    """
    for name in MEDIA:
        if row.get(name) not in (None, "", [], {}):
            raise BadField(name, "holds what is no text, and only text is read: rename the column to keep it out")
    tally.columns.update(name for name, value in row.items() if value is not None)
    for name, value in row.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            turns = [turn for turn in value if isinstance(turn, dict)]
            tally["turns_marked_for_training_that_are_not_the_assistant's"] += sum(map(_marked, turns))
            tally.columns.update(f"{name}[].{key}" for turn in turns for key, held in turn.items() if held is not None)
    return Watched(row, tally.used)


def _marked(turn: Row) -> bool:
    """True if a turn of the user, the system or a tool asks to be trained on: only the assistant's turns are."""
    role = str(turn.get("role") or turn.get("from") or "")
    return role in ("user", "human", "system", "tool") and any(turn.get(name) in (1, True) for name in TRAINED)


def unused(tally: Tally) -> list[str]:
    """Columns that no reader has asked for, and fields of turns whose column is used."""
    left = sorted(tally.columns - tally.used)
    return [name for name in left if "[]" not in name or name.partition("[]")[0] in tally.used]
