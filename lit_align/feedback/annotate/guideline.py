"""The guideline that annotators follow: Markdown with a header that says what is asked."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import yaml

from lit_align.utils import limits

DEFAULT = """\
# Compare the completions

Choose the completion that helps the person who wrote the prompt most, and that is true and harmless. Longer is not
better. Call it equal only where you would not mind which of the two you got.
"""
_KEYS = ("criteria", "scale")


@dataclass(frozen=True)
class Guideline:
    """What annotators read, and what they are asked beside a preference.

    Attributes:
        text: Markdown.
        criteria: names of further scales, such as helpful, truthful and harmless.
        scale: highest score of a criterion; the lowest is 1.
    """

    text: str = DEFAULT
    criteria: tuple[str, ...] = ()
    scale: int = 5

    @property
    def version(self) -> str:
        """Changes with the text and with what is asked: 12 hexadecimal digits."""
        content = "\0".join([self.text, *self.criteria, str(self.scale)])
        return hashlib.sha256(content.encode()).hexdigest()[:12]

    def html(self) -> str:
        """The text as HTML: raw HTML is shown as text, images are left out, and links open without a referrer."""
        from markdown_it import MarkdownIt

        return str(MarkdownIt("commonmark", {"html": False}).enable("table").disable("image").render(self.text))


def read_guideline(path: str | Path | None) -> Guideline:
    """The guideline in a file; without one, a short one.

    The file may begin with a header between two lines of `---`: `criteria: [helpful, truthful, harmless]`, `scale: 7`.

    Raises:
        OSError: no such file.
        ValueError: a header that cannot be used; names the file, the key and the way out.
    """
    if path is None:
        return Guideline()
    text = limits.read_text(path)
    header, asked = "", {}
    if text.startswith("---\n"):
        header, closed, text = text[4:].partition("\n---\n")
        if not closed:
            raise ValueError(f"{path}: the header begins with --- and has no end: close it with a line of ---")
        try:
            asked = limits.load_yaml(header, path)
        except yaml.YAMLError as error:
            raise ValueError(f"{path}: the header is not YAML: {' '.join(str(error).split())}") from error
        if not isinstance(asked, dict):
            raise ValueError(f"{path}: the header is {asked!r:.40}, expected keys among {', '.join(_KEYS)}")
    for key in asked:
        if key not in _KEYS:
            raise ValueError(f"{path}: the header has {key!r:.40}, expected keys among {', '.join(_KEYS)}")
    criteria, scale = asked.get("criteria") or [], asked.get("scale", 5)
    if not isinstance(criteria, list) or not all(isinstance(name, str) and name.strip() for name in criteria):
        raise ValueError(f"{path}: criteria is {criteria!r:.60}, expected a list of names")
    if len(set(criteria)) < len(criteria) or len(criteria) > 10:
        raise ValueError(f"{path}: criteria is {criteria!r:.60}, expected at most ten names, no two alike")
    if not isinstance(scale, int) or isinstance(scale, bool) or not 2 <= scale <= 10:
        raise ValueError(f"{path}: scale is {scale!r:.40}, expected a whole number from 2 to 10")
    if not text.strip():
        raise ValueError(f"{path}: holds no guideline below its header")
    return Guideline(text, tuple(name.strip() for name in criteria), scale)
