"""What must not reach the page does not, and changes nothing."""

from __future__ import annotations

import asyncio
import hmac
import json
import stat
from pathlib import Path
from typing import Any

import pytest
from support.annotation import label_for, task_rows, write_rows

pytest.importorskip("sqlalchemy", reason="the page's dependencies are an extra: pip install 'lit_align[annotate]'")
pytest.importorskip("starlette", reason="the page's dependencies are an extra: pip install 'lit_align[annotate]'")
pytest.importorskip("httpx", reason="starlette's test client needs it")

from starlette.testclient import TestClient

from lit_align.feedback.annotate.desk import Desk, Rules
from lit_align.feedback.annotate.guard import ADMINISTRATOR, LARGEST_BODY, Guard, Rates, Tokens, host_of, key_in
from lit_align.feedback.annotate.guideline import Guideline
from lit_align.feedback.annotate.server import application
from lit_align.feedback.annotate.tables import connect, sqlite_url
from lit_align.feedback.tasks import build_tasks

NASTY = ["<script>alert(1)</script>", "[l](javascript:alert(1)) \x1b[31mred\x1b[0m \u202eback", "plain"]


class Site:
    def __init__(self, folder: Path, rate: float = 1000.0) -> None:
        rows = [{"prompt": "<img src=x onerror=alert(1)>", "completions": NASTY}, *task_rows(5)]
        made = build_tasks([write_rows(folder / "tasks.jsonl", rows)])[0]
        rules = Rules(("ada", "bob"), 1)
        self.desk = Desk(connect(sqlite_url(folder / "labels.db")), rules, Guideline(), made)
        self.tokens = Tokens(key_in(folder / "key"), rules.annotators)
        guarded = application(self.desk, self.tokens, ["localhost"], rate)
        self.client = TestClient(guarded, base_url="http://localhost", raise_server_exceptions=False)

    def headers(self, name: str = "ada") -> dict[str, str]:
        return {"Authorization": f"Bearer {self.tokens[name]}"}

    def get(self, path: str, name: str = "ada", **headers: str) -> Any:
        return self.client.get(path, headers={**self.headers(name), **headers})

    def post(self, path: str, body: Any, name: str = "ada", **headers: str) -> Any:
        content = body if isinstance(body, (bytes, str)) else json.dumps(body)
        told = {**self.headers(name), "Content-Type": "application/json", **headers}
        return self.client.post(path, content=content, headers=told)

    def label(self, name: str = "ada") -> dict[str, Any]:
        session = self.get("/api/session", name).json()
        return label_for(session["task"], session["version"])


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


def test_a_label_goes_in_and_comes_out(site: Site) -> None:
    answer = site.post("/api/labels", site.label())
    assert answer.status_code == 200
    assert answer.json()["progress"]["done"] == 1
    assert site.post("/api/undo", {}).json()["said"]["shown"]
    site.post("/api/labels", site.label())
    told = site.get("/api/admin/overview", ADMINISTRATOR).json()
    assert (told["labels"], told["wanted"]) == (1, 6)
    exported = site.get("/api/admin/export", ADMINISTRATOR)
    assert [json.loads(line)["annotator"] for line in exported.text.splitlines()] == ["ada"]
    assert json.loads(site.get("/api/admin/export?form=pairs", ADMINISTRATOR).text.splitlines()[0])["chosen"]
    assert site.get("/api/admin/export?form=other", ADMINISTRATOR).status_code == 422


def test_every_answer_has_the_headers_and_pages_have_nothing_inline(site: Site) -> None:
    for path in ("/", "/admin", "/static/page.js", "/static/page.css", "/api/session", "/none"):
        answer = site.get(path)
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert answer.headers["cache-control"] == "no-store"
    for path in ("/", "/admin"):
        page = site.get(path).text
        assert "<style" not in page
        assert " style=" not in page
        assert " onclick=" not in page
        assert page.count("<script") == page.count("<script src=") == 1


def test_texts_reach_the_page_as_text_without_commands_to_a_terminal(site: Site) -> None:
    told = site.get("/api/session")
    task = told.json()["task"]
    assert told.headers["content-type"] == "application/json"
    assert sorted(task["completions"]) == sorted(
        ["<script>alert(1)</script>", r"[l](javascript:alert(1)) \x1b[31mred\x1b[0m \u202eback", "plain"]
    )
    assert "\x1b" not in told.text
    scripts = (Path(__file__).parents[2] / "lit_align/feedback/annotate/static/page.js").read_text()
    # The guideline alone is HTML, which the server makes of Markdown.
    assert scripts.count("innerHTML") == 1
    for way in ("insertAdjacentHTML", "outerHTML", "document.write", "eval(", "new Function"):
        assert way not in scripts


def test_a_wrong_token_opens_nothing(site: Site) -> None:
    token = site.tokens["ada"]
    for header in (
        None,
        "",
        token,
        f"Basic {token}",
        f"Bearer {token}x",
        f"Bearer {token[:-1]}",
        "Bearer é",
        "Bearer ",
    ):
        headers = {} if header is None else {"Authorization": header.encode("latin-1")}
        assert site.client.get("/api/session", headers=headers).status_code == 401
    assert site.get("/api/admin/overview").status_code == 403
    assert site.get("/api/session", ADMINISTRATOR).status_code == 403
    assert site.client.get(f"/api/session?token={token}").status_code == 401


def test_tokens_are_compared_in_constant_time_and_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, compared = Tokens(b"0" * 32, ["ada", "bob", "cat"]), []
    compare = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: compared.append(b) or compare(a, b))
    assert tokens.whose(f"Bearer {tokens['ada']}") == "ada"
    assert len(compared) == 4
    assert len({tokens[name] for name in ("ada", "bob", "cat")}) == 3
    assert Tokens(b"1" * 32, ["ada"])["ada"] != tokens["ada"]


def test_the_key_is_private_and_outlives_a_restart(tmp_path: Path) -> None:
    key = key_in(tmp_path / "key")
    assert key_in(tmp_path / "key") == key
    assert stat.S_IMODE((tmp_path / "key").stat().st_mode) == 0o600
    (tmp_path / "key").write_text("short")
    with pytest.raises(ValueError, match="is not a key"):
        key_in(tmp_path / "key")


FOREIGN = [
    {"Origin": "http://evil.example"},
    {"Origin": "null"},
    {"Origin": "http://localhost:1"},
    {"Origin": "http://localhost.evil.example"},
    {"Sec-Fetch-Site": "cross-site"},
    {"Sec-Fetch-Site": "same-site"},
]


@pytest.mark.parametrize("headers", FOREIGN, ids=str)
def test_posts_of_another_origin_are_refused(site: Site, headers: dict[str, str]) -> None:
    assert site.post("/api/labels", site.label(), **headers).status_code == 403
    assert site.desk.labels() == []


def test_posts_of_the_page_itself_are_taken(site: Site) -> None:
    own = {"Origin": "http://localhost", "Sec-Fetch-Site": "same-origin"}
    assert site.post("/api/labels", site.label(), **own).status_code == 200


@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example", "", "127.0.0.1:80@evil"])
def test_another_host_is_refused(site: Site, host: str) -> None:
    assert site.client.get("/", headers={"Host": host}).status_code == 421
    assert site.get("/api/session", Host=host).status_code == 421


def test_hosts_are_read_without_their_ports() -> None:
    assert [host_of(h) for h in ("a:80", "A", "[::1]:80", "[::1]", "a b", "a/b")] == ["a", "a", "::1", "::1", "", ""]


MALFORMED = [
    (b"", 400),
    (b"{", 400),
    (b"\xff", 400),
    (b"[" * 50_000, 400),
    (b"null", 422),
    (b"[]", 422),
    (b"{}", 422),
    (b'{"id": 1}', 422),
    (b"x" * (LARGEST_BODY + 1), 413),
    (json.dumps({"id": "x" * LARGEST_BODY}).encode(), 413),
]


@pytest.mark.parametrize(("body", "status"), MALFORMED, ids=[str(body[:20]) for body, _ in MALFORMED])
def test_a_malformed_or_oversize_request_is_refused_and_changes_nothing(site: Site, body: bytes, status: int) -> None:
    before = site.get("/api/session").json()
    answer = site.post("/api/labels", body)
    assert answer.status_code == status
    assert set(answer.json()) == {"error"}
    assert site.get("/api/session").json() == before


def test_a_body_without_a_length_is_bounded_too(site: Site) -> None:
    headers = {**site.headers(), "Content-Type": "application/json"}
    pieces = (b"x" * 1000 for _ in range(LARGEST_BODY // 1000 + 2))
    assert site.client.post("/api/labels", content=pieces, headers=headers).status_code == 413
    assert site.post("/api/labels", b"{}", **{"Content-Length": "-1"}).status_code == 413


def test_other_types_methods_and_paths_are_refused(site: Site) -> None:
    assert site.post("/api/labels", b"{}", **{"Content-Type": "text/plain"}).status_code == 415
    assert site.client.request("PUT", "/api/labels", headers=site.headers()).status_code == 405
    assert site.client.request("OPTIONS", "/api/labels", headers=site.headers()).status_code == 405
    assert site.get("/api/labels").status_code == 405
    for path in ("/api/none", "/static/../server.py", "/static/%2e%2e/server.py", "/static/admin.py"):
        assert site.get(path).status_code == 404


def test_another_annotators_task_and_a_made_up_one_are_refused(site: Site) -> None:
    theirs = site.label("ada")
    site.label("bob")
    assert site.post("/api/labels", theirs, "bob").status_code == 404
    assert site.post("/api/labels", {**theirs, "task": "0" * 16}, "bob").status_code == 404
    assert site.desk.labels() == []


def test_rates_are_bounded_for_annotators_and_for_wrong_tokens(tmp_path: Path) -> None:
    slow = Site(tmp_path, rate=2.0)
    answers = [slow.get("/api/session") for _ in range(20)]
    refused = [answer for answer in answers if answer.status_code == 429]
    assert 8 <= len(refused) <= 12
    assert int(refused[0].headers["retry-after"]) >= 1
    assert slow.get("/api/session", "bob").status_code == 200  # one annotator does not stop another
    wrong = [slow.client.get("/api/session", headers={"Authorization": "Bearer x"}).status_code for _ in range(10)]
    assert wrong.count(429) >= 6
    assert slow.get("/api/session", "bob").status_code == 200


def test_a_bucket_fills_with_time_and_forgets_the_longest_unheard() -> None:
    now = [0.0]
    rates = Rates(2.0, 3.0, lambda: now[0], most=2)
    assert [rates.wait("a") for _ in range(4)] == [0, 0, 0, 0.5]
    now[0] = 0.5
    assert [rates.wait("a"), rates.wait("a")] == [0, 0.5]
    for name in ("b", "c"):
        rates.wait(name)
    assert len(rates._of) == 2


def test_a_fault_of_the_server_shows_no_more_than_that(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Desk, name: str) -> None:
        raise RuntimeError("secret inside")

    monkeypatch.setattr(Desk, "current", broken)
    answer = site.get("/api/session")
    assert answer.status_code == 500
    assert "secret inside" not in answer.text


def test_websockets_are_closed(site: Site) -> None:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(Guard(None, site.tokens, [])({"type": "websocket", "path": "/"}, None, send))  # type: ignore[arg-type]
    assert [message["type"] for message in sent] == ["websocket.close"]
