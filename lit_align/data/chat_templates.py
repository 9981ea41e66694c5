"""Chat templates by name or from a file. Those that ship with the package append only.

A template appends only if a conversation is rendered the same whatever follows it: then all its turns are trained on in
one sequence, and each sees what the model sees when it answers.
"""

from __future__ import annotations

import re
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from lit_align.data.files import expand

FOLDER = Path(__file__).parent / "templates"
NAMES = tuple(sorted(path.stem for path in FOLDER.glob("*.jinja")))
# Turns are marked by tokens of this form; a tokenizer without them splits them like other text.
_MARK = re.compile(r"<\|(?:im_start|im_end|start_header_id|end_header_id|eot_id|end)\|>|<(?:start|end)_of_turn>")
_LARGEST = 1 << 20  # bytes of a template's file


def read_template(given: str) -> str:
    """A chat template by its name, from a file, or as it is given.

    Raises:
        ValueError: neither a name, nor a file that can be read, nor Jinja.
    """
    if given in NAMES:
        return (FOLDER / f"{given}.jinja").read_text()
    if "{{" in given or "{%" in given:
        return given
    path = Path(expand(given))
    try:
        if path.is_file() and path.stat().st_size <= _LARGEST:
            return path.read_text()
    except (OSError, UnicodeError) as error:
        raise ValueError(f"data.chat_template: the file {given!r} cannot be read: {error}") from error
    raise ValueError(
        f"data.chat_template: {given!r} is neither a template by name ({', '.join(NAMES)}), nor a file, nor Jinja text"
    )


def absent_tokens(template: str, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Marks of turns that a template writes and that are no tokens of the tokenizer."""
    vocabulary = tokenizer.get_vocab()
    return [mark for mark in dict.fromkeys(_MARK.findall(template)) if mark not in vocabulary]
