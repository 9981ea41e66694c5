"""The page in a real browser: Debian's Chromium, driven by Playwright."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.annotation import Server, running, write_rows

for needed in ("sqlalchemy", "starlette", "uvicorn"):
    pytest.importorskip(needed, reason="the page's dependencies are an extra: pip install 'lit_align[annotate]'")
playwright = pytest.importorskip(
    "playwright.sync_api", reason="the browser test needs playwright: pip install playwright"
)
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="the browser test needs Chromium: apt-get install chromium"),
]

GUIDE = """---
criteria: [helpful, truthful, harmless]
---
# What is better?

Prefer what is **true** and what helps. <script>document.title = "broken"</script> [Read more](https://example.org).
"""
PAIRS = [
    {"prompt": [{"role": "user", "content": f"Which river is longer? ({i})"}],
     "completions": [f"The Nile, by about 250 km. ({i})", f"I do not know. ({i})"]} for i in range(2)
]  # fmt: skip
RANKINGS = [
    {"prompt": f"Write a line about the sea. ({i})",
     "completions": [f"first {i} <script>document.title = 'broken'</script>", f"second {i} \x1b[31mred",
                     f"third {i} مرحبا 👩‍🔬 $x^2$", f"fourth {i}\n    indented code"]} for i in range(2)
]  # fmt: skip
PHONE, DESKTOP = {"width": 390, "height": 844}, {"width": 1280, "height": 900}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as play:
        made = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield made
        made.close()


@pytest.fixture
def serving(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    with contextlib.ExitStack() as stack:

        def serve(rows: list[dict[str, Any]], guideline: str | None = None, *options: str) -> Server:
            more = list(options)
            if guideline:
                (tmp_path / "guide.md").write_text(guideline)
                more += ["--guideline", str(tmp_path / "guide.md")]
            file = write_rows(tmp_path / "tasks.jsonl", rows)
            return stack.enter_context(running(file, tmp_path / "out", "--annotators", "ada,bob", *more))

        yield serve


class Visit:
    """An annotator's page. What the browser complains of fails the test.

    Args:
        browser: of Playwright.
        server: of the annotation.
        name: of the annotator.
        size: of the window.
        path: of the page.
    """

    def __init__(
        self, browser: Any, server: Server, name: str, size: dict[str, int] = DESKTOP, path: str = "/"
    ) -> None:
        self.server, self.name = server, name
        self.context = browser.new_context(viewport=size, has_touch=size is PHONE, is_mobile=size is PHONE)
        self.page = self.context.new_page()
        self.complaints: list[str] = []
        self.page.on("console", lambda m: self.complaints.append(m.text) if m.type in ("error", "warning") else None)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.goto(f"{server.base}{path}#{server.links()[name]}")
        self.says("done", r"\d")

    def says(self, place: str, pattern: str) -> None:
        """Wait until the element of this id has such a text; the page's policy forbids Playwright's own way."""
        playwright.expect(self.page.locator(f"#{place}")).to_have_text(re.compile(pattern), timeout=20_000)

    def done(self, count: int) -> None:
        """Wait until so many are stored."""
        self.says("done", f"^{count} done")

    def order(self) -> list[str]:
        """Letters of the ranking, the best first."""
        return [text.split()[0] for text in self.page.locator(".handle").all_inner_texts()]

    def stored(self) -> list[dict[str, Any]]:
        """Labels of this annotator."""
        admin = self.server.client("administrator")
        import urllib.request

        request = urllib.request.Request(
            f"{self.server.base}/api/admin/export", headers={"Authorization": f"Bearer {admin.token}"}
        )
        with urllib.request.urlopen(request) as response:
            rows = [json.loads(line) for line in response.read().decode().splitlines()]
        return [row for row in rows if row["annotator"] == self.name]

    def shot(self, name: str) -> None:
        """A screenshot, where LIT_ALIGN_SCREENSHOTS names a folder."""
        if folder := os.environ.get("LIT_ALIGN_SCREENSHOTS"):
            self.page.screenshot(path=str(Path(folder) / f"{name}.png"), full_page=True)

    def close(self) -> None:
        self.context.close()
        assert self.complaints == []


def shown_ranks(row: dict[str, Any]) -> list[float]:
    """Ranks in the order on the page."""
    return [row["ranks"][k] for k in row["shown"]]


def test_two_annotators_compare_at_once_by_mouse_and_by_keyboard(browser: Any, serving: Callable[..., Server]) -> None:
    server = serving(PAIRS)
    ada, bob = Visit(browser, server, "ada"), Visit(browser, server, "bob", PHONE)
    ada.shot("pair-desktop")
    bob.shot("pair-phone")
    ada.page.get_by_label("A is better").check()
    ada.page.get_by_role("button", name="Submit").click()
    bob.page.keyboard.press("6")
    bob.page.keyboard.press("Enter")
    ada.done(1)
    bob.done(1)
    ada.page.keyboard.press("4")
    ada.page.keyboard.press("Enter")
    ada.done(2)
    assert "no further tasks" in ada.page.locator("#task-title").inner_text()
    ada.shot("end-desktop")
    assert [(shown_ranks(row), row.get("strength")) for row in ada.stored()] == [([0, 1], 2), ([0, 0], None)]
    assert [(shown_ranks(row), row.get("strength")) for row in bob.stored()] == [([1, 0], 2)]
    ada.page.keyboard.press("Alt+u")
    ada.page.get_by_role("button", name="Undo last").click()
    ada.page.wait_for_selector("#answer:not([hidden])")
    assert ada.page.get_by_label("Equal").is_checked()
    ada.page.get_by_label("B is much better").check()
    ada.page.get_by_role("button", name="Submit").click()
    ada.done(2)
    assert shown_ranks(ada.stored()[1]) == [1, 0]
    assert ada.stored()[1]["strength"] == 3
    ada.close()
    bob.close()


def test_a_ranking_by_keyboard_survives_a_reload(browser: Any, serving: Callable[..., Server]) -> None:
    ada = Visit(browser, serving(RANKINGS), "ada")
    page = ada.page
    page.keyboard.press("Enter")
    assert "You have moved nothing" in page.locator("#status").inner_text()
    assert ada.stored() == []
    page.keyboard.press("d")
    page.keyboard.press("ArrowUp")
    page.keyboard.press("ArrowUp")
    page.keyboard.press("ArrowUp")
    assert ada.order() == ["D", "A", "B", "C"]
    assert "Completion D is at place 1 of 4" in page.locator("#status").inner_text()
    page.keyboard.press("c")
    page.keyboard.press("=")
    page.reload()
    page.wait_for_selector(".handle")
    assert ada.order() == ["D", "A", "B", "C"]
    assert page.locator("li.tied .handle").inner_text().startswith("C")
    page.keyboard.press("Enter")
    ada.done(1)
    assert [shown_ranks(row) for row in ada.stored()] == [[1, 2, 2, 0]]
    ada.close()


def test_a_ranking_by_drag_and_by_buttons(browser: Any, serving: Callable[..., Server]) -> None:
    ada = Visit(browser, serving(RANKINGS), "ada")
    page = ada.page
    ada.shot("ranking-desktop")
    grip, target = (
        page.locator('.handle[data-k="3"]').bounding_box(),
        page.locator("ol.ranking li").first.bounding_box(),
    )
    page.mouse.move(grip["x"] + 10, grip["y"] + 10)
    page.mouse.down()
    page.mouse.move(target["x"] + 30, target["y"] + 60, steps=8)
    page.mouse.move(target["x"] + 30, target["y"] + 5, steps=5)
    page.mouse.up()
    assert ada.order() == ["D", "A", "B", "C"]
    page.get_by_role("button", name="Completion A down").click()
    assert ada.order() == ["D", "B", "A", "C"]
    page.get_by_label("ties with the one above").nth(2).check()
    page.get_by_role("button", name="Submit").click()
    ada.done(1)
    assert [shown_ranks(row) for row in ada.stored()] == [[2, 1, 2, 0]]
    page.get_by_role("button", name="Undo last").click()
    playwright.expect(page.locator(".handle").first).to_contain_text("D")
    assert ada.order() == ["D", "B", "A", "C"]
    ada.close()


def test_texts_are_shown_as_text_and_the_guideline_without_scripts(
    browser: Any, serving: Callable[..., Server]
) -> None:
    ada = Visit(browser, serving(RANKINGS, GUIDE), "ada")
    said = ada.page.locator("#completions").inner_text()
    assert "<script>document.title = 'broken'</script>" in said
    assert "\\x1b[31mred" in said
    assert "    indented code" in said
    assert "<script>" in ada.page.locator("#guideline").inner_text()
    assert ada.page.title() == "Compare completions"
    assert ada.page.locator("#guideline a").get_attribute("rel") == "noopener noreferrer"
    ada.close()


def test_criteria_are_asked_for_each_completion(browser: Any, serving: Callable[..., Server]) -> None:
    ada = Visit(browser, serving(PAIRS, GUIDE), "ada")
    page = ada.page
    page.keyboard.press("1")
    assert page.locator("#submit").is_disabled()
    for name in ("helpful", "truthful", "harmless"):
        for k, letter in enumerate("AB"):
            page.get_by_role("radiogroup", name=f"{name}, completion {letter}").get_by_label(str(4 - k)).check()
    ada.shot("criteria-desktop")
    page.keyboard.press("Enter")
    ada.done(1)
    (row,) = ada.stored()
    assert {name: [scores[k] for k in row["shown"]] for name, scores in row["criteria"].items()} == {
        name: [4, 3] for name in ("helpful", "truthful", "harmless")
    }
    ada.close()


def test_skip_and_flag(browser: Any, serving: Callable[..., Server]) -> None:
    ada = Visit(browser, serving(PAIRS), "ada")
    ada.page.keyboard.press("Alt+s")
    ada.done(1)
    ada.page.keyboard.press("Alt+f")
    ada.page.keyboard.type("neither answers 1 of them")
    ada.page.get_by_role("button", name="Send flag").click()
    ada.done(2)
    told = ada.server.client("administrator").ask("/api/admin/overview")[1]
    assert [flag["reason"] for flag in told["flags"]] == ["neither answers 1 of them"]
    assert ada.stored() == []
    ada.close()


def test_a_lost_connection_loses_nothing(browser: Any, serving: Callable[..., Server]) -> None:
    ada = Visit(browser, serving(PAIRS), "ada")
    ada.page.route("**/api/labels", lambda route: route.abort())
    ada.page.keyboard.press("2")
    ada.page.keyboard.press("Enter")
    ada.says("trouble", "kept here")
    ada.page.unroute("**/api/labels")
    ada.page.reload()
    ada.done(1)
    assert [row["strength"] for row in ada.stored()] == [2]
    ada.complaints = [text for text in ada.complaints if "ERR_FAILED" not in text]
    ada.close()


def test_an_answer_that_got_lost_is_stored_once(browser: Any, serving: Callable[..., Server]) -> None:
    ada = Visit(browser, serving(PAIRS), "ada")
    lost = []

    def lose(route: Any) -> None:
        if lost:
            route.continue_()
        else:
            lost.append(route.fetch().status)  # it reaches the server; its answer does not reach the page
            route.abort()

    ada.page.route("**/api/labels", lose)
    ada.page.keyboard.press("2")
    ada.page.keyboard.press("Enter")
    ada.done(1)
    assert lost == [200]
    assert len(ada.stored()) == 1
    ada.complaints = [text for text in ada.complaints if "ERR_FAILED" not in text]
    ada.close()


def test_a_link_without_its_token_opens_nothing(browser: Any, serving: Callable[..., Server]) -> None:
    server = serving(PAIRS)
    page = browser.new_page()
    page.goto(server.base)
    playwright.expect(page.locator("#task-title")).to_contain_text("whole link")
    page.goto(f"{server.base}/?x=1#wrong")
    playwright.expect(page.locator("#trouble")).to_contain_text("token is wrong")
    page.close()


def test_the_administrator_sees_progress_and_exports(browser: Any, serving: Callable[..., Server]) -> None:
    server = serving(PAIRS)
    for name in ("ada", "bob"):
        visit = Visit(browser, server, name)
        for n in (1, 2):
            visit.page.keyboard.press("1")
            visit.page.keyboard.press("Enter")
            visit.done(n)
        visit.close()
    admin = Visit(browser, server, "administrator", path="/admin")
    admin.says("done", "^4 of 4 labels")
    assert "agreement" in admin.page.locator("#agreement").inner_text()
    with admin.page.expect_download() as loading:
        admin.page.get_by_role("button", name="Labels (JSONL)").click()
    assert len(Path(loading.value.path()).read_text().splitlines()) == 4
    admin.shot("admin-desktop")
    admin.close()


@pytest.mark.parametrize("size", [PHONE, DESKTOP], ids=["phone", "desktop"])
@pytest.mark.parametrize("rows", [PAIRS, RANKINGS], ids=["pair", "ranking"])
def test_axe_finds_nothing_serious_and_nothing_overflows(
    browser: Any, serving: Callable[..., Server], size: dict[str, int], rows: list[dict[str, Any]]
) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="pip install axe-playwright-python")
    server = serving([{**row, "completions": [*row["completions"][:-1], "long " * 2000]} for row in rows], GUIDE)
    visit = Visit(browser, server, "ada", size)
    visit.page.locator("#help").click()
    for path in ("/", "/admin"):
        if path == "/admin":
            visit.page.goto(f"{server.base}/admin#{server.links()['administrator']}")
            visit.page.wait_for_selector("#annotators td")
        else:
            visit.shot(
                f"{'ranking' if rows is RANKINGS else 'pair'}-{'phone' if size is PHONE else 'desktop'}-guideline"
            )
        wide = visit.page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        assert wide <= 0, path
        visit.page.context.set_default_timeout(60_000)
        found = axe.Axe().run(visit.page).response["violations"]
        serious = [
            (one["id"], [n["target"] for n in one["nodes"]])
            for one in found
            if one["impact"] in ("serious", "critical")
        ]
        assert serious == [], path
    visit.context.close()
