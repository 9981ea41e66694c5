"""The label row: what one annotator said of the completions of one task. A file of them trains reward models as it is.

A row holds the columns that `PreferenceDataModule` reads (prompt, completions, ranks), and beside them who said so, how
strongly, by which criteria and under which version of the guideline:

    {"prompt": str | messages, "completions": [str], "ranks": [float],      lower is better, equal is a tie
     "task": str, "annotator": str, "strength"?: 1 (slightly), 2, 3 (much), "criteria"?: {name: [one per completion]},
     "guideline"?: str, "category"?: str, "shown"?: [int], "sources"?: [...], "seconds"?: float, "control"?: true,
     "expected"?: [float], "time"?: str, "finished"?: [bool], "tools"?: [...]}

A pair is K = 2. Rows of prompt, chosen, rejected and annotator are read, too. Completions of a task are brought into
one order, that of a hash of their text, so that labels of several annotators and files can be compared, and the order
tells nothing of who wrote them.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lit_align.utils.disk import replacing, write_whole

Row = dict[str, Any]
STRENGTHS = (1, 2, 3)  # slightly better, better, much better


@dataclass(frozen=True)
class Label:
    """One annotator's judgement of one task.

    Attributes:
        prompt: text or messages.
        completions: K answers, in the task's order.
        ranks: one for each, lower is better, equal is a tie.
        annotator: who judged.
        task: names the prompt with these completions; see `task_id`.
        strength: of a pair that is no tie: 1 slightly, 2, 3 much better; None where nobody asked.
        criteria: for each criterion a score for each completion, higher is better.
        guideline: version of the guideline that the annotator saw.
        category: of the prompt.
        shown: in which order the completions stood on the page: numbers into `completions`.
        sources: for each completion, where it came from: one entry for each copy that was merged.
        seconds: time on the task.
        control: whether the right answer was known beforehand.
        expected: of a control, the known ranks.
        time: when, ISO 8601 in UTC.
        finished: for each completion, whether it ended by itself.
        tools: of the prompt.
    """

    prompt: Any
    completions: tuple[str, ...]
    ranks: tuple[float, ...]
    annotator: str
    task: str = ""
    strength: int | None = None
    criteria: dict[str, list[float]] = field(default_factory=dict)
    guideline: str | None = None
    category: str | None = None
    shown: tuple[int, ...] | None = None
    sources: list[Any] | None = None
    seconds: float | None = None
    control: bool = False
    expected: tuple[float, ...] | None = None
    time: str | None = None
    finished: tuple[bool, ...] | None = None
    tools: Any = None

    def row(self) -> Row:
        """As it is written; what is not known is left out."""
        given = {name: value for name, value in vars(self).items() if value not in (None, {}, False)}
        listed = {name: list(value) if isinstance(value, tuple) else value for name, value in given.items()}
        return {name: listed[name] for name in ("prompt", "completions", "ranks", "task", "annotator")} | listed


def task_id(prompt: Any, completions: Sequence[str]) -> str:
    """A name for a prompt with these completions, in whatever order: 16 hexadecimal digits."""
    content = json.dumps([prompt, sorted(completions)], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def neutral_order(completions: Sequence[str]) -> list[int]:
    """Numbers of the completions in the order of a hash of their text: it tells nothing of who wrote them."""
    return sorted(
        range(len(completions)),
        key=lambda k: hashlib.sha256(completions[k].encode("utf-8", "surrogatepass")).digest(),
    )


def reordered(label: Label, order: Sequence[int]) -> Label:
    """The same label with its completions in another order: the k-th becomes that of number `order[k]`."""

    def take(values: Sequence[Any] | None) -> Any:
        return None if values is None else type(values)(values[k] for k in order)  # type: ignore[call-arg]

    place = {old: new for new, old in enumerate(order)}
    return replace(
        label,
        completions=take(label.completions),
        ranks=take(label.ranks),
        criteria={name: take(scores) for name, scores in label.criteria.items()},
        shown=None if label.shown is None else tuple(place[k] for k in label.shown),
        sources=take(label.sources),
        finished=take(label.finished),
        expected=take(label.expected),
    )


def label_of(row: Row) -> Label:
    """The label in a row, its completions in neutral order.

    Raises:
        BadField: what is wrong with the row.
    """
    from lit_align.data.formats import FORMATS, recognise
    from lit_align.data.messages import tools_of, without_nulls
    from lit_align.data.rows import BadField, filled, missing, number_of, text_of

    row = without_nulls(row)
    kind = recognise(row)
    if kind not in ("pairs", "rankings", "hh"):
        raise BadField("ranks", f"{missing(row)}: a label has prompt, completions and ranks, or chosen and rejected")
    (read,) = FORMATS[kind](row)
    count = len(read["completions"])
    texts = [text_of({f"completions[{k}]": text}, f"completions[{k}]") for k, text in enumerate(read["completions"])]
    if isinstance(row.get("ranks"), list) and any(isinstance(ranks, list) for ranks in row["ranks"]):
        raise BadField("ranks", "are of several people: a label is of one annotator, write a row for each")
    if len(set(texts)) < count:
        raise BadField("completions", "holds the same text twice: merge the duplicates")
    strength = row.get("strength")
    if strength is not None and (strength not in STRENGTHS or isinstance(strength, bool)):
        raise BadField("strength", f"is {strength!r:.40}, expected 1 (slightly), 2 or 3 (much better)")
    shown = row.get("shown")
    if shown is not None and (not isinstance(shown, list) or sorted(map(str, shown)) != sorted(map(str, range(count)))):
        raise BadField("shown", f"is {shown!r:.40}, expected the numbers 0 to {count - 1} in the order on the page")
    sources = row.get("sources")
    if sources is not None and (not isinstance(sources, list) or len(sources) != count):
        raise BadField("sources", f"is {sources!r:.40}, expected an entry for each of {count} completions")
    expected = row.get("expected")
    if expected is not None:
        if not isinstance(expected, list) or len(expected) != count:
            raise BadField("expected", f"is {expected!r:.40}, expected a rank for each of {count} completions")
        expected = [number_of({f"expected[{k}]": rank}, f"expected[{k}]") for k, rank in enumerate(expected)]
    label = Label(
        prompt=read["prompt"],
        completions=tuple(texts),
        ranks=tuple(map(float, read["ranks"])),
        annotator=filled(row, "annotator"),
        task=text_of(row, "task", "") or task_id(read["prompt"], texts),
        strength=None if strength is None else int(strength),
        criteria=_criteria(row, count),
        guideline=text_of(row, "guideline", "") or None,
        category=None if row.get("category") is None else str(row["category"]),
        shown=None if shown is None else tuple(map(int, shown)),
        sources=sources,
        seconds=None if row.get("seconds") is None else number_of(row, "seconds"),
        control=row.get("control") is True,
        expected=None if expected is None else tuple(expected),
        time=text_of(row, "time", "") or None,
        finished=tuple(read["finished"]) if read.get("finished") else None,
        tools=tools_of(row) or None,
    )
    return reordered(label, neutral_order(texts))


def _criteria(row: Row, count: int) -> dict[str, list[float]]:
    from lit_align.data.rows import BadField, number_of

    criteria = row.get("criteria")
    if criteria is None:
        return {}
    if not isinstance(criteria, dict):
        raise BadField("criteria", f"is {type(criteria).__name__}, expected a score per completion under each name")
    for name, scores in criteria.items():
        if not isinstance(scores, list) or len(scores) != count:
            raise BadField(f"criteria.{name}", f"is {scores!r:.40}, expected a number for each of {count} completions")
    return {
        str(name): [number_of({f"criteria.{name}": score}, f"criteria.{name}") for score in scores]
        for name, scores in criteria.items()
    }


def read_labels(*paths: str | Path) -> list[Label]:
    """The labels in files of any format that the data modules read, among them JSONL and Parquet.

    Raises:
        BadRow: a row that is no label; names file, row and field.
        ValueError: no such file, or no labels in it.
    """
    from lit_align.data.files import open_files, read_rows
    from lit_align.data.rows import BadField, BadRow

    labels = []
    for path in paths:
        for name, handle in open_files(str(path)):
            for number, row in read_rows(name, handle):
                if isinstance(row, BadRow):
                    raise row
                try:
                    labels.append(label_of(row))
                except BadField as problem:
                    raise BadRow(name, number, problem) from None
    if not labels:
        raise ValueError(f"{', '.join(map(str, paths))}: holds no labels")
    return labels


def write_labels(path: str | Path, labels: Iterable[Label]) -> int:
    """Write labels to a .jsonl or .parquet file, whole or not at all; return their number.

    Raises:
        ValueError: another ending; or, of Parquet, prompts of which some are text and some are messages.
    """
    return write_rows(path, (label.row() for label in labels))


def write_rows(path: str | Path, rows: Iterable[Row]) -> int:
    """See `write_labels`; of rows of any kind."""
    path, held = Path(path), list(rows)
    if path.suffix == ".jsonl":
        write_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in held))
    elif path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet

        names = dict.fromkeys(name for row in held for name in row)
        try:
            table = pa.table({name: [row.get(name) for row in held] for name in names})
        except pa.ArrowException as error:
            raise ValueError(f"{path}: a column holds values of several kinds ({error}): write .jsonl") from error
        with replacing(path) as partial:
            pyarrow.parquet.write_table(table, partial)
    else:
        raise ValueError(f"{path}: expected a file that ends with .jsonl or .parquet")
    return len(held)


def control_score(label: Label) -> float | None:
    """Share of the decided pairs of a control that a label ranks as expected; None where nothing is expected."""
    if label.expected is None:
        return None
    pairs = itertools.combinations(range(len(label.expected)), 2)
    decided = [(i, j) for i, j in pairs if label.expected[i] != label.expected[j]]
    right = [(label.ranks[i] - label.ranks[j]) * (label.expected[i] - label.expected[j]) > 0 for i, j in decided]
    return sum(right) / len(right) if right else None


def pairs_of(labels: Iterable[Label]) -> Iterator[Row]:
    """Rows of prompt, chosen and rejected, as TRL's DPOTrainer and RewardTrainer load them.

    A ranking of K completions becomes its decided pairs; ties have no form there and are left out. Prompts that are
    messages get answers that are messages, as TRL wants them.
    """
    for label in labels:
        for i, j in itertools.combinations(range(len(label.ranks)), 2):
            if label.ranks[i] == label.ranks[j]:
                continue
            better, worse = (i, j) if label.ranks[i] < label.ranks[j] else (j, i)
            texts = {"chosen": label.completions[better], "rejected": label.completions[worse]}
            sides: Row = dict(texts)
            if isinstance(label.prompt, list):
                sides = {side: [{"role": "assistant", "content": text}] for side, text in texts.items()}
            told = {"annotator": label.annotator, "task": label.task}
            if label.strength is not None:
                told["strength"] = label.strength  # type: ignore[assignment]
            yield {"prompt": label.prompt, **sides, **told}
