from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.annotation import write_rows
from support.tiny import tiny_config, tiny_folder
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from lit_align.cli import main
from lit_align.config.errors import ConfigError
from lit_align.feedback.answerers import Answer, Endpoint, Folder
from lit_align.feedback.judge import Cache, agreement_with, estimate, judge, questions, verdict
from lit_align.feedback.labels import Label, label_of, read_labels
from lit_align.feedback.tasks import Task, build_tasks

ROWS = [
    {"prompt": "Count.", "completions": ["one", "one two", "one two three"]},
    {"prompt": [{"role": "user", "content": "Say."}], "completions": ["a", "b c"]},
]


def tasks(folder: Path) -> list[Task]:
    return build_tasks([write_rows(folder / "tasks.jsonl", ROWS)])[0]


class Fake:
    """Prefers more words, or always the first; counts what it was asked."""

    name = "fake"

    def __init__(self, place: bool = False, nonsense: int = 0) -> None:
        self.place, self.nonsense, self.asked = place, nonsense, 0

    def answer(self, messages: Any, attempt: int) -> Answer:
        self.asked += 1
        if attempt < self.nonsense:
            return Answer("A is better [[A]] I think", 10, 5)
        text = messages[0]["content"]
        if "<answer>" in text:
            words = len(re.search(r"<answer>\n(.*)\n</answer>", text, re.DOTALL)[1].split())  # type: ignore[index]
            return Answer(f"Because.\n[[{min(words, 5)}]]", 10, 5)
        first, second = (re.search(rf"<answer_{x}>\n(.*)\n</answer_{x}>", text, re.DOTALL)[1] for x in "AB")  # type: ignore[index]
        won = "A" if self.place or len(first.split()) > len(second.split()) else "B"
        return Answer(f"Because.\n[[{won}]]", 10, 5)


def test_verdicts_are_parsed_strictly() -> None:
    assert verdict("why\n[[A]]", "ABC") == "A"
    assert verdict("why\n [[C]]. \n\n", "ABC") == "C"
    for text in ("", "[[A]] is better", "A", "[A]", "[[a]]", "[[AB]]", "[[D]]", "[[A]]\nbut [[B]] too", "[[A]] [[B]]"):
        assert verdict(text, "ABC") is None, text
    assert verdict("[[5]]", "1-5") == "5"
    assert verdict("[[6]]", "1-5") is None


def test_both_orders_rank_by_wins(tmp_path: Path) -> None:
    judged = judge(tasks(tmp_path), Fake(), Cache(tmp_path / "cache.jsonl"))
    assert judged.counts["calls"] == 2 * (3 + 1)
    assert judged.flips.value == 0
    assert judged.first.value == 0.5
    for label in judged.labels:
        words = np.array([len(text.split()) for text in label.completions])
        assert list(np.argsort(label.ranks)) == list(np.argsort(-words))
        assert label.annotator == "judge:fake"


def test_a_judge_that_goes_with_the_place_says_nothing_but_ties(tmp_path: Path) -> None:
    judged = judge(tasks(tmp_path), Fake(place=True), Cache(tmp_path / "cache.jsonl"))
    assert judged.flips.value == judged.first.value == 1.0
    assert all(len(set(label.ranks)) == 1 for label in judged.labels)


def test_scores_by_criterion_rank_by_their_mean(tmp_path: Path) -> None:
    judged = judge(tasks(tmp_path), Fake(), Cache(tmp_path / "cache.jsonl"), "scored", ["helpfulness", "honesty"])
    assert judged.counts["calls"] == 2 * (3 + 2)
    label = judged.labels[0]
    assert label.criteria["honesty"] == [len(text.split()) for text in label.completions]
    assert label.ranks == tuple(-score for score in label.criteria["helpfulness"])
    assert np.isnan(judged.flips.value)


def test_what_does_not_parse_is_asked_again_and_then_left_out(tmp_path: Path) -> None:
    judged = judge(tasks(tmp_path), Fake(nonsense=2), Cache(tmp_path / "a.jsonl"))
    assert (judged.counts["tasks"], judged.counts["did_not_parse"]) == (2, 16)
    judged = judge(tasks(tmp_path), Fake(nonsense=3), Cache(tmp_path / "b.jsonl"))
    assert (judged.counts["tasks_left_out"], judged.labels) == (2, [])


def test_a_judge_goes_on_where_it_stopped_even_after_half_a_line(tmp_path: Path) -> None:
    path, made = tmp_path / "cache.jsonl", tasks(tmp_path)
    whole = judge(made, Fake(), Cache(path))
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:5]) + lines[5][:30])
    asked = [question for task in made for question in questions(task, "pairwise")]
    assert estimate(asked, "fake", Cache(path))["calls"] == 3
    fake = Fake()
    again = judge(made, fake, Cache(path))
    assert fake.asked == 3
    assert again.labels == whole.labels
    fake = Fake()
    assert judge(made, fake, Cache(path)).labels == whole.labels
    assert fake.asked == 0
    assert judge(made, fake, Cache(path), principle="Be brief.").counts["calls"] == 8  # another question


def test_agreement_with_people_by_hand() -> None:
    def label(name: str, task: str, *ranks: float) -> Label:
        return Label("p", tuple("abc"[: len(ranks)]), ranks, name, task)

    judged = [label("judge", "t", 0, 1, 2), label("judge", "u", 0, 1)]
    people = [label("ada", "t", 0, 2, 1), label("bob", "u", 0, 1), label("bob", "v", 0, 1)]
    share, overlap = agreement_with(judged, people, 50)
    assert (share.value, overlap) == (pytest.approx(3 / 4), 2)


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server: Any = self.server
        server.seen.append((self.path, body, self.headers.get("Authorization")))
        answer = Answer("", 0, 0) if server.broken else Fake().answer(body["messages"], 0)
        usage = {"prompt_tokens": answer.asked, "completion_tokens": answer.said}
        told = {"choices": [{"message": {"content": answer.text}}], "usage": usage}
        content = b"no JSON" if server.broken else json.dumps(told).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *said: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Any]:
    made: Any = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    made.seen, made.broken, made.url = [], False, f"http://127.0.0.1:{made.server_port}/v1"
    threading.Thread(target=made.serve_forever, daemon=True).start()
    yield made
    made.shutdown()
    made.server_close()


def test_the_command_judges_at_an_endpoint_and_compares_with_people(
    tmp_path: Path, server: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("JUDGE_KEY", "secret-word")
    file, out = write_rows(tmp_path / "tasks.jsonl", ROWS), tmp_path / "out"
    person = {**ROWS[1], "ranks": [1, 0], "annotator": "ada"}
    people = str(write_rows(tmp_path / "people.jsonl", [label_of(person).row()]))
    command = [
        "judge",
        str(file),
        "--out",
        str(out),
        "--endpoint",
        server.url,
        "--model",
        "m",
        "--key-variable",
        "JUDGE_KEY",
    ]
    main([*command, "--estimate", "--prices", "1,2"])
    assert server.seen == []
    assert "8 calls (0 more are cached)" in capsys.readouterr().out
    figures = main([*command, "--people", people])
    assert {path for path, _, _ in server.seen} == {"/v1/chat/completions"}
    assert server.seen[0][2] == "Bearer secret-word"
    assert server.seen[0][1]["temperature"] == 0.0
    assert (figures["calls"], figures["prompt_tokens"], figures["people_agreement"][0]) == (8, 80, 1.0)
    assert len(read_labels(out / "labels.jsonl")) == 2
    assert "secret-word" not in "".join(path.read_text() for path in out.iterdir())
    main(command)
    assert len(server.seen) == 8


def test_an_endpoint_that_answers_no_completion_is_named(server: Any) -> None:
    server.broken = True
    with pytest.raises(ValueError, match=r"the judge at http://127.*answered b'no JSON', which is no chat completion"):
        Endpoint(server.url, "m").answer([{"role": "user", "content": "x"}], 0)


def test_a_reward_models_folder_ranks_by_its_scores(tmp_path: Path) -> None:
    tiny_folder(tmp_path / "base")
    torch.manual_seed(0)
    config = tiny_config("llama", num_labels=1)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "reward")
    AutoTokenizer.from_pretrained(tmp_path / "base").save_pretrained(tmp_path / "reward")
    file = write_rows(tmp_path / "tasks.jsonl", [{"prompt": "Count.", "completions": ["one", "two", "three"]}])
    main(["judge", str(file), "--out", str(tmp_path / "out"), "--reward", str(tmp_path / "reward")])
    (label,) = read_labels(tmp_path / "out" / "labels.jsonl")
    assert label.annotator == "reward:reward"
    assert len(set(label.ranks)) == 3
    assert label.task == build_tasks([file])[0][0].id


def test_a_language_models_folder_answers_and_needs_a_chat_template(tmp_path: Path) -> None:
    tiny_folder(tmp_path / "model")
    tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path / "model")
    for template in (tmp_path / "model").glob("chat_template*"):
        template.unlink()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="has no chat template"):
        Folder(str(tmp_path / "model"))
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tokenizer.save_pretrained(tmp_path / "model")
    judge_here = Folder(str(tmp_path / "model"), max_tokens=4)
    answer = judge_here.answer([{"role": "user", "content": "Say"}], 0)
    assert answer == judge_here.answer([{"role": "user", "content": "Say"}], 0)
    assert answer.asked >= 3
    assert 1 <= answer.said <= 4


def test_arguments_that_make_no_judge_are_named(tmp_path: Path) -> None:
    file = str(write_rows(tmp_path / "tasks.jsonl", ROWS))
    with pytest.raises(ConfigError, match="name one judge"):
        main(["judge", file, "--out", str(tmp_path / "out")])
    with pytest.raises(ConfigError, match="--prices must be two numbers"):
        main(["judge", file, "--out", str(tmp_path / "out"), "--model", "m", "--prices", "a"])
    with pytest.raises(ValueError, match="must begin with http"):
        Endpoint("ftp://x", "m")
    with pytest.raises(ValueError, match="NO_SUCH: the environment variable is not set"):
        Endpoint("http://x", "m", "NO_SUCH")
