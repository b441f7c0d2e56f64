"""Photos as they come in, part by part: who sends slowly keeps nobody waiting, and memory holds but so many."""

import asyncio
import json

import pytest
from reference.painter import Painter, png, strip

from mvdream_fast.web import app as apps
from mvdream_fast.web import guard
from mvdream_fast.web.app import PHOTOS_AT_ONCE, make_app
from mvdream_fast.web.board import Board


@pytest.fixture
def painter(tmp_path):
    return Painter(tmp_path / "out")


async def sends(app, parts: list[bytes], end: asyncio.Event) -> tuple[int, dict]:
    """The answer to a photo that comes in parts, and is whole, with nothing more, at the `end`."""
    sent, left = [], list(parts)

    async def send(message):
        sent.append(message)

    async def receive():
        if left:
            return {"type": "http.request", "body": left.pop(0), "more_body": True}
        await end.wait()
        return {"type": "http.request", "body": b"", "more_body": False}

    headers = [(b"host", b"127.0.0.1:7008"), (b"content-length", str(sum(map(len, parts))).encode())]
    scope = {"type": "http", "method": "POST", "path": "/api/photos", "raw_path": b"/api/photos", "query_string": b""}
    await app(scope | {"headers": headers}, receive, send)
    return sent[0]["status"], json.loads(sent[1]["body"])


def test_photos_that_stall_are_waited_for_by_nobody(painter, monkeypatch):
    image = png(strip(3, 0.5))

    async def all_of_them():
        app, never, now = make_app(Board(painter.root)), asyncio.Event(), asyncio.Event()
        now.set()
        stalled = [asyncio.create_task(sends(app, [image[:9]], never)) for _ in range(2 * PHOTOS_AT_ONCE)]
        await asyncio.sleep(0)
        whole = await asyncio.wait_for(sends(app, [image[:9], image[9:]], now), 60)
        never.set()
        return whole, await asyncio.gather(*stalled)

    (status, named), broken = asyncio.run(all_of_them())
    assert (status, named["url"]) == (200, f"photos/{named['id']}.png")
    assert {status for status, _ in broken} == {400}

    monkeypatch.setattr(guard, "BODY_S", 0.05)
    late = asyncio.run(sends(make_app(Board(painter.root)), [image[:9]], asyncio.Event()))
    assert late == (408, {"error": "What was sent took too long to arrive; send it again."})


def test_only_so_much_of_photos_is_held(painter, monkeypatch):
    image = png(strip(3, 0.5))
    monkeypatch.setattr(apps, "MOST_HELD", 2 * len(image))

    async def all_of_them():
        app, end = make_app(Board(painter.root)), asyncio.Event()
        first = asyncio.create_task(sends(app, [image], end))
        await asyncio.sleep(0.05)
        refused = await asyncio.wait_for(sends(app, [image, image], end), 60)
        end.set()
        return refused, await first, await sends(app, [image], end)

    refused, *kept = asyncio.run(all_of_them())
    assert refused == (429, {"error": "Many photos are being sent; try again in a minute"})
    assert [status for status, _ in kept] == [200, 200]
