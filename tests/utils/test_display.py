"""Text from elsewhere reaches the terminal, the card and the report without a byte that commands a terminal."""

from __future__ import annotations

import io
import json
import logging
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from support.configs import config
from support.parsers import only
from support.runs import write_rows
from support.tiny import tiny_folder

from lit_align.__main__ import entry
from lit_align.cli.chatting import converse
from lit_align.cli.commands import _asked
from lit_align.cli.entry import main
from lit_align.report import write_report
from lit_align.utils.display import printable

# Clears the screen; retitles the window; writes to the clipboard; turns text around; overwrites the line; a C1 control.
ATTACK = "\x1b[2J\x1b]0;owned\x07\x1b]52;c;cm0=\x07\u202eevil\u2066\rnothing\x9b31m\x08\u2028\U000e0041\x7f"


def harmless(text: str) -> bool:
    return not any((ord(c) < 32 and c not in "\n\t") or c in "\x7f\x9b\u202e\u2066\u2028\U000e0041\ufeff" for c in text)


def test_what_cannot_be_seen_is_escaped() -> None:
    shown = printable(ATTACK)
    assert harmless(shown)
    assert shown.isprintable()
    assert "\\x1b[2J" in shown
    assert "\\u202e" in shown
    assert printable("a\nb\tc") == "a\\nb\\tc"
    assert printable("a\nb\tc", lines=True) == "a\nb\tc"
    assert printable("a\r\nb", lines=True) == "a\\r\nb"


@pytest.mark.parametrize(
    "text", ["", "plain", "réponse", "答え", "می‌خواهم", "👩‍👩‍👧", "עברית", "a — b … “c”", "½ ñ \ufffd"]
)
def test_what_can_be_seen_stays(text: str) -> None:
    assert printable(text) == text


class Talker:
    """A chat whose model answers with an attack, word after word, as a streamer hands it on."""

    tokenizer = SimpleNamespace(decode=lambda ids, **_: "".join(map(chr, ids)))

    def __init__(self, stops: bool = False) -> None:
        self.messages: list[dict[str, str]] = []
        self.stops = stops

    def say(self, text: str, streamer: Any) -> None:
        self.messages.append({"role": "user", "content": text})
        for piece in ("Hello ", *ATTACK):
            streamer.on_finalized_text(piece)
        if self.stops:
            raise KeyboardInterrupt
        streamer.on_finalized_text("\n", stream_end=True)


def test_an_answer_in_chat_is_shown_escaped(capsys: pytest.CaptureFixture) -> None:
    converse(Talker(), ["Hi"])  # type: ignore[arg-type]
    out = capsys.readouterr().out
    assert harmless(out)
    assert "Hello \\x1b[2J" in out


def test_an_answer_that_is_interrupted_is_forgotten(capsys: pytest.CaptureFixture) -> None:
    chat = Talker(stops=True)
    converse(chat, ["Hi", "Again"])  # type: ignore[arg-type]
    assert chat.messages == []
    assert capsys.readouterr().out.count("stopped") == 2


@pytest.mark.parametrize("raised", [KeyboardInterrupt, EOFError])
def test_an_interrupted_prompt_ends_the_conversation(
    raised: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(prompt: str) -> str:
        raise raised

    monkeypatch.setattr("builtins.input", fail)
    assert _asked("> ") == ""


def test_bytes_that_are_no_text_are_a_question_too(monkeypatch: pytest.MonkeyPatch) -> None:
    for errors in ("strict", "surrogateescape"):
        stdin = io.TextIOWrapper(io.BytesIO(b"caf\xe9 \xff\n"), encoding="utf-8", errors=errors)
        monkeypatch.setattr("sys.stdin", stdin)
        asked = _asked("> ")
        assert asked.encode() == "caf\ufffd \ufffd".encode()


def test_an_error_is_one_line_of_text(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    evil = ATTACK.replace("\u2028", "") + ".yaml"
    Path(evil).write_text("model: [")
    for args in (
        ["fit", "-c", evil],
        ["pipeline", evil],
        ["sweep", evil],
        [ATTACK],
        ["report", ATTACK],
        ["fit", f"--{ATTACK}=1"],
    ):
        monkeypatch.setattr("sys.argv", ["lit-align", *args])
        assert entry() == 1
        err = capsys.readouterr().err
        assert harmless(err)
        assert err.count("\n") == 1
        assert "\\x1b" in err


def test_warnings_and_tracebacks_are_escaped(tmp_path: Path) -> None:
    code = (
        "import warnings, lit_align.cli.entry\n"
        f"def main():\n    warnings.warn({ATTACK!r})\n    raise RuntimeError({ATTACK!r})\n"
        "lit_align.cli.entry.main = main\n"
        "from lit_align.__main__ import entry; entry()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert harmless(done.stderr)
    assert done.stderr.count("\\x1b[2J") == 2
    assert "Traceback" in done.stderr


def test_a_run_on_evil_names_says_them_escaped(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    only("fit", monkeypatch)
    write_rows(tmp_path)
    evil = tmp_path / f"rows{ATTACK}|`<b>`.json"
    rows = str(tmp_path / "rows*.json")  # YAML takes no control characters; a folder of files does
    evil.write_text(json.dumps([*json.loads((tmp_path / "demos.json").read_text()), {"instruction": ATTACK}]))
    content = config("sft", tiny_folder(tmp_path / "model"), tmp_path, tmp_path / "run", max_steps=1)
    content["data"]["init_args"] |= {
        "train": [{"path": rows}],
        "val": [{"path": rows}],
        "cache_dir": "none",
        "on_bad_row": "skip",
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(content))
    main(["fit", "-c", str(tmp_path / "run.yaml")])
    shown = capsys.readouterr()
    assert harmless((shown.out + shown.err).replace("\r", ""))  # a bar of transformers begins its line anew
    assert all(harmless(record.getMessage()) for record in caplog.records)
    assert any("\\x1b" in record.getMessage() for record in caplog.records)
    run = tmp_path / "run"
    card = (run / "model" / "README.md").read_text()
    assert harmless(card)
    assert "<b>" not in card.partition("<details>")[0]
    for name in ("metrics.csv", "manifest.json", "config.yaml"):
        assert "\x1b" not in (run / name).read_text()
    page = write_report(run).read_text()
    assert harmless(page)


def test_a_name_in_a_card_stays_in_its_place() -> None:
    from lit_align.callbacks.card import inline

    assert inline("a`b|c\nd<script>\x1b[0m") == "a'b\\|c\\nd&lt;script>\\x1b[0m"


def test_what_is_in_a_run_comes_escaped_to_the_report(tmp_path: Path) -> None:
    stage = tmp_path / f"stage{ATTACK}"
    stage.mkdir()
    (stage / "metrics.csv").write_text("epoch,step,train/loss\n0,1,1.0\n0,2,0.5\n")
    lines = [{"policy": f"p{ATTACK}", "prompt": ATTACK, "answer": ATTACK, "reward": 1.0, "category": ATTACK}]
    (stage / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "summary.json").write_text(json.dumps({f"p{ATTACK}/kl": 1.0, f"p{ATTACK}/reward": 0.5, "seconds": 1}))
    (tmp_path / "manifest.json").write_text(json.dumps({"commit": ATTACK, "seed": 1}))
    page = write_report(tmp_path).read_text()
    assert harmless(page)
    assert "\\x1b[2J" in page


def test_the_names_of_rewards_can_be_seen() -> None:
    from lit_align import LengthReward, SumReward

    with pytest.raises(ValueError, match="invisible characters"):
        SumReward([LengthReward(1)], names=[ATTACK])


def test_a_record_of_a_log_keeps_its_text(caplog: pytest.LogCaptureFixture) -> None:
    from lit_align.utils.display import escape_record

    record = logging.LogRecord("x", logging.INFO, "f", 1, "%s is %d%%", ("a\x1b", 3), None)
    assert escape_record(record)
    assert record.getMessage() == "a\\x1b is 3%"
    assert warnings.showwarning.__module__ != "lit_align.utils.display"  # the suite's own stay as they are
