"""Work that a file of somebody else's decides ends."""

from __future__ import annotations

import resource
import signal
import threading
import time

import pytest

from lit_align.data.render import Renderer
from lit_align.data.rows import BadField
from lit_align.models.scratch import bpe_tokenizer
from lit_align.utils import bounds
from lit_align.utils.bounds import at_most


def limits() -> tuple[object, ...]:
    return resource.getrlimit(resource.RLIMIT_DATA), signal.getsignal(signal.SIGALRM), signal.getitimer(0)


def test_time_ends_and_nothing_is_left_behind() -> None:
    before, began = limits(), time.monotonic()
    with pytest.raises(TimeoutError, match=r"0\.1 s"), at_most(seconds=0.1):
        sum(1 for _ in iter(int, 1))
    assert time.monotonic() - began < 5
    assert limits() == before


def test_memory_ends() -> None:
    before = limits()
    with pytest.raises(MemoryError), at_most(memory=64 << 20):
        bytearray(256 << 20)
    assert limits() == before
    bytearray(256 << 20)


def test_another_timer_and_another_thread_are_left_alone() -> None:
    signal.setitimer(signal.ITIMER_REAL, 100)
    try:
        with at_most(seconds=0.01):
            time.sleep(0.05)
        assert signal.getitimer(signal.ITIMER_REAL)[0] > 90
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    ended = []

    def work() -> None:
        with at_most(seconds=0.01):
            ended.append(1)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert ended


@pytest.mark.parametrize(
    "bomb",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% set n = namespace(s='aaaaaaaa') %}{% for i in range(40) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
        "{% for m in messages %}{{ m['content'] * 10**10 }}{% endfor %}",
    ],
)
def test_a_chat_template_neither_hangs_nor_takes_all_memory(bomb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounds.at_most.__wrapped__, "__defaults__", (0.5, 256 << 20))  # type: ignore[attr-defined]
    tokenizer = bpe_tokenizer([], 300)
    tokenizer.chat_template = bomb
    with pytest.raises(BadField, match="chat template"):
        Renderer(tokenizer)([{"role": "user", "content": "Dolor?"}])
