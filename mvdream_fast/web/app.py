"""The addresses of the page: its own files, what the board shows, and what a person may ask of it.

Every answer to a question is JSON; an error is {"error": one sentence}. No part of an address or of a body is ever a
path: files are named by a job's id and one of the board's own names.
"""

import asyncio
import hashlib
import json
from collections.abc import Callable
from importlib.resources import files
from typing import Annotated, Any

from fastapi import Body, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from mvdream_fast.core.errors import ArgumentError, InputFileError, UserError
from mvdream_fast.web.board import Board, Busy, Unknown
from mvdream_fast.web.guard import MAX_PHOTO, App, Guard

PAGE = {"": "text/html", "style.css": "text/css", "icon.svg": "image/svg+xml"}
PAGE |= dict.fromkeys(("page.js", "base.js", "turner.js"), "text/javascript")
PHOTOS_AT_ONCE = 4
MOST_HELD = 8 * MAX_PHOTO  # bytes of photos in memory, whoever sends them
FOR_A_DAY = {"cache-control": "private, max-age=86400, immutable"}  # of addresses that change with their content

Asked = Annotated[dict[str, Any], Body()]


def page_file(name: str) -> bytes:
    """A file of the page, as it lies in the package."""
    return (files("mvdream_fast.web") / "page" / (name or "index.html")).read_bytes()


def make_app(board: Board, token: str | None = None) -> App:
    """The whole application, behind its guard."""
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    _add_page(app)
    _add_errors(app)
    _add_questions(app, board)
    _add_photos(app, board)
    _add_files(app, board)
    return Guard(app, token, page_file("signin.html"))


def _add_page(app: FastAPI) -> None:
    for name, kind in PAGE.items():
        app.add_api_route(f"/{name}", _sender(page_file(name), kind), response_class=Response)


def _sender(content: bytes, kind: str) -> Callable[[], Response]:
    def send() -> Response:
        return Response(content, headers={"cache-control": "no-cache"}, media_type=kind)

    return send


def _add_errors(app: FastAPI) -> None:
    """What a person did wrong, as one sentence."""

    def answer(status: int, sentence: str) -> JSONResponse:
        return JSONResponse({"error": sentence[:1].upper() + sentence[1:]}, status)

    statuses = {Unknown: 404, Busy: 429, ArgumentError: 400, InputFileError: 400, UserError: 500}
    for kind, status in statuses.items():
        app.add_exception_handler(kind, lambda _, error, status=status: answer(status, str(error)))
    app.add_exception_handler(RequestValidationError, lambda *_: answer(400, "what was sent is not what is asked here"))
    app.add_exception_handler(HTTPException, lambda _, error: answer(_status(error), "there is nothing here"))
    app.add_exception_handler(Exception, lambda *_: answer(500, "the server has a fault; its terminal says which"))


def _status(error: Exception) -> int:
    return error.status_code if isinstance(error, HTTPException) else 500


def _add_questions(app: FastAPI, board: Board) -> None:
    @app.get("/api/state")
    def state(request: Request, find: str = "", limit: int = 48, id: str = "") -> Response:
        body = json.dumps(board.state(find, limit, id)).encode()
        tag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
        headers = {"etag": tag, "cache-control": "no-cache"}
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        return Response(body, headers=headers, media_type="application/json")

    @app.post("/api/views")
    def views(asked: Asked) -> dict[str, str]:
        return {"id": board.views(asked)}

    @app.post("/api/jobs/{job_id}/grow")
    def grow(job_id: str, asked: Asked) -> dict[str, str]:
        return {"id": board.grow(job_id, asked)}

    @app.post("/api/jobs/{job_id}/cancel")
    def cancel(job_id: str) -> dict[str, str]:
        return {"id": board.cancel(job_id)}

    @app.post("/api/jobs/{job_id}/retry")
    def retry(job_id: str) -> dict[str, str]:
        return {"id": board.retry(job_id)}

    @app.post("/api/subjects")
    def subjects(asked: Asked) -> dict[str, str]:
        return {"id": board.teach(asked)}


def _add_photos(app: FastAPI, board: Board) -> None:
    at_once = asyncio.Semaphore(PHOTOS_AT_ONCE)
    n_held = 0

    @app.post("/api/photos")
    async def photos(request: Request) -> dict[str, str]:
        """A photo is held in memory until it is decoded. Its turn comes once all of it is here: who sends slowly, or
        stops, is waited for by nobody."""
        nonlocal n_held
        parts: list[bytes] = []
        try:
            async for part in request.stream():
                parts.append(part)
                n_held += len(part)
                if n_held > MOST_HELD:
                    raise Busy("many photos are being sent; try again in a minute")
            async with at_once:
                name = await asyncio.to_thread(board.uploads.add, b"".join(parts))
        except ClientDisconnect:
            raise HTTPException(400) from None
        finally:
            n_held -= sum(map(len, parts))
        return {"id": name, "url": f"photos/{name}.png"}


def _add_files(app: FastAPI, board: Board) -> None:
    @app.get("/photos/{name}.png")
    def photo(name: str) -> Response:
        path = board.uploads.path(name)
        if path is None:
            raise Unknown("there is no such photo")
        return FileResponse(path, headers=FOR_A_DAY, media_type="image/png")

    @app.get("/files/{job_id}/{kind}/{number}.png")
    def image(job_id: str, kind: str, number: int) -> Response:
        return FileResponse(board.image(job_id, kind, number), headers=FOR_A_DAY, media_type="image/png")

    @app.get("/files/{job_id}/{name}")
    def file(job_id: str, name: str) -> Response:
        """An image is shown; anything else is only ever saved, a report with its scripts above all."""
        found = board.file(job_id, name)
        saved = None if found.kept.is_shown else found.saved_as
        return FileResponse(found.path, headers=FOR_A_DAY, media_type=found.kept.media_type, filename=saved)
