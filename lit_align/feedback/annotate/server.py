"""The page over HTTP."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from lit_align.feedback.annotate.desk import Desk
from lit_align.feedback.annotate.guard import Guard, Tokens
from lit_align.feedback.annotate.posted import Refused
from lit_align.feedback.labels import pairs_of
from lit_align.utils.display import printable

STATIC = Path(__file__).parent / "static"
FILES = {
    "/": ("page.html", "text/html"),
    "/admin": ("admin.html", "text/html"),
    "/static/page.js": ("page.js", "text/javascript"),
    "/static/admin.js": ("admin.js", "text/javascript"),
    "/static/page.css": ("page.css", "text/css"),
    "/static/icon.svg": ("icon.svg", "image/svg+xml"),
}


def application(desk: Desk, tokens: Tokens, hosts: list[str], rate: float = 10.0) -> Guard:
    """The ASGI application.

    Args:
        desk: hands out tasks and stores labels.
        tokens: who may ask.
        hosts: names under which the page is reached.
        rate: requests a second of one annotator.
    """

    def session(request: Request) -> Any:
        name, guideline = request.scope["annotator"], desk.guideline
        told = {"annotator": name, "guideline": guideline.html(), "version": guideline.version}
        asked = {"criteria": list(guideline.criteria), "scale": guideline.scale}
        return {**told, **asked, **_shown(desk.current(name))}

    def store(request: Request, posted: Any) -> Any:
        return _shown(desk.store(request.scope["annotator"], posted))

    def undo(request: Request, posted: Any) -> Any:
        return _shown(desk.undo(request.scope["annotator"]))

    routes = [Route(path, _file(*named)) for path, named in FILES.items()]
    routes += [
        Route("/api/session", _get(session)),
        Route("/api/labels", _post(store), methods=["POST"]),
        Route("/api/undo", _post(undo), methods=["POST"]),
        Route("/api/admin/overview", _get(lambda request: _overview(desk))),
        Route("/api/admin/export", lambda request: _export(desk, request)),
    ]
    return Guard(Starlette(routes=routes), tokens, hosts, rate)


def _file(name: str, kind: str) -> Callable[[Request], Response]:
    def answer(request: Request) -> Response:
        return FileResponse(STATIC / name, media_type=kind)

    return answer


def _get(call: Callable[[Request], Any]) -> Callable[[Request], Response]:
    def answer(request: Request) -> Response:  # not async: runs in a thread
        return _said(lambda: call(request))

    return answer


def _post(call: Callable[[Request, Any], Any]) -> Callable[[Request], Any]:
    async def answer(request: Request) -> Response:
        from starlette.concurrency import run_in_threadpool

        try:
            posted = json.loads(await request.body())
        except (ValueError, RecursionError):
            return JSONResponse({"error": "the request is not JSON"}, 400)
        return await run_in_threadpool(lambda: _said(lambda: call(request, posted)))

    return answer


def _said(call: Callable[[], Any]) -> Response:
    try:
        return JSONResponse(call())
    except Refused as refused:
        return JSONResponse({"error": refused.reason}, refused.status)


def _shown(answer: dict[str, Any]) -> dict[str, Any]:
    """The same with texts of a task as a page may show them: what would turn or hide text is escaped."""
    task = answer.get("task")
    if task is None:
        return answer
    prompt = [{name: printable(text, lines=True) for name, text in turn.items()} for turn in task["prompt"]]
    texts = [printable(text, lines=True) for text in task["completions"]]
    return {**answer, "task": {**task, "prompt": prompt, "completions": texts}}


def _overview(desk: Desk) -> dict[str, Any]:
    from lit_align.feedback.agreement import agreement, plain

    told = {**desk.overview(), "agreement": None, "flags": desk.flags()[-100:]}
    counted = [label for label in desk.labels(screened=True) if not label.control]
    if counted:
        told["agreement"] = plain(agreement(counted, resamples=200)["overall"])
    return told


def _export(desk: Desk, request: Request) -> Response:
    form = request.query_params.get("form", "labels")
    if form not in ("labels", "pairs"):
        return JSONResponse({"error": "form must be labels or pairs"}, 422)
    labels = desk.labels(screened=request.query_params.get("screened") == "1")
    rows = pairs_of(labels) if form == "pairs" else (label.row() for label in labels)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    named = {"content-disposition": f'attachment; filename="{form}.jsonl"'}
    return PlainTextResponse(text, media_type="application/jsonl; charset=utf-8", headers=named)
