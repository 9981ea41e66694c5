"""What a chat template makes of a turn: the answer is scored, and the prompt is not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lit_align.data.data_module import TextDataModule
from lit_align.data.instruction import InstructionDataModule
from lit_align.data.rows import BadField, Tally
from lit_align.doctor.finding import Finding
from lit_align.types import Example

ASKED, ANSWERED = "Which river is that?", "The Danube, in Vienna."


def template(data: TextDataModule, examples: Sequence[Example]) -> Iterator[Finding]:
    """Put a turn of a user and one of an assistant through the template, and read what is scored."""
    sequences = [sequence for example in examples for sequence in (example.branches or [example.trunk])]
    if sequences and not any(any(sequence.scored) for sequence in sequences):
        yield Finding("wrong", "template", "no token of any example is scored: see data.chat_template")
        return
    if not isinstance(data, InstructionDataModule) or not data.tokenizer.chat_template:
        return
    plain = all(all(sequence.scored[1:]) for sequence in sequences)
    turns = [{"role": "user", "content": ASKED}, {"role": "assistant", "content": ANSWERED}]
    kept, data.max_length = data.max_length, 100_000  # the template is looked at, not the room
    try:
        (item,) = data.encode({"messages": turns}, Tally())
    except BadField as error:
        # Of plain text alone, no template is asked.
        yield Finding("look" if plain else "wrong", "template", f"cannot render a turn: {error}")
        return
    finally:
        data.max_length = kept
    trunk = item.example.trunk
    scored = data.tokenizer.decode([token for token, counts in zip(*trunk, strict=True) if counts])
    if ANSWERED not in scored:
        says = f"of the answer {ANSWERED!r} it scores {scored!r}"
        yield Finding("look" if plain else "wrong", "template", f"{says}: see data.chat_template")
    elif ASKED in scored and data.loss_on == "response":
        says = "what the user says is scored, too, and would be imitated"
        yield Finding("look" if plain else "wrong", "template", f"{says}: see data.chat_template")
    else:
        yield Finding("ok", "template", "answers are scored" + ("" if data.loss_on == "all" else ", prompts are not"))
