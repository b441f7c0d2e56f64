"""Who gets an answer: this machine's own page, or who knows the token; no page of another origin, nothing too large."""

import asyncio
import json

import pytest
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from mvdream_fast.web import guard
from mvdream_fast.web.guard import Guard

TOKEN = "a-token-of-some-length"
OWN = "127.0.0.1:7008"


async def echo(scope, receive, send):
    """An application that answers everything, and counts what it was asked."""
    assert scope["type"] == "http"
    body = await guard._body(receive)
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]})
    await send({"type": "http.response.body", "body": b"in:" + body})


def client(token=None, host=OWN, **options) -> TestClient:
    return TestClient(Guard(echo, token, b"<form>"), base_url=f"http://{host}", follow_redirects=False, **options)


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(guard, "WRONG_TOKEN_S", 0.0)


def test_own_names_are_answered_and_no_others():
    for host in (OWN, "localhost:7008", "127.0.0.1", "LOCALHOST:9"):  # another port: the end of a tunnel
        assert client(host=host).get("/").status_code == 200
    for host in ("rebound.example", "rebound.example:7008", "127.0.0.1.example", "127.0.0.2", "0.0.0.0", "[::1"):
        answer = client().get("/", headers={"host": host})
        assert answer.status_code == 403
        assert "127.0.0.1 and localhost only" in answer.json()["error"]


def raw(headers, method="GET", path="/", body=b"", kind="http"):
    """The status for headers that no client would send."""
    sent = []

    async def send(message):
        sent.append(message)

    async def receive():
        return {"type": "http.request", "body": body}

    scope = {
        "type": kind,
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": headers,
    }
    asyncio.run(Guard(echo)(scope, receive, send))
    return sent[0].get("status", sent[0]["type"])


def test_one_host_and_one_only():
    own = (b"host", OWN.encode())
    assert raw([own]) == 200
    assert raw([]) == 403
    assert raw([own, (b"host", b"rebound.example")]) == 403
    assert raw([own], kind="websocket") == "websocket.close"


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "null", "http://127.0.0.1:9999", "http://localhost:7008", "http://[", ""]
)
@pytest.mark.parametrize("token", [None, TOKEN])
def test_no_page_of_another_origin_may_ask(origin, token):
    headers = {"origin": origin, "authorization": f"Bearer {token}"}
    for method in ("GET", "POST"):
        assert client(token).request(method, "/api/views", headers=headers, content=b"{}").status_code == 403


def test_the_own_origin_may_ask():
    assert client().post("/api/views", headers={"origin": f"http://{OWN}"}, content=b"{}").text == "in:{}"
    assert (
        client(TOKEN).get("/", headers={"origin": f"https://{OWN}", "authorization": f"Bearer {TOKEN}"}).status_code
        == 200
    )


def test_another_site_may_lead_to_the_page_and_no_further():
    foreign = {"sec-fetch-site": "cross-site"}
    assert client().get("/", headers=foreign | {"sec-fetch-mode": "navigate"}).status_code == 200
    assert client().get("/", headers=foreign | {"sec-fetch-mode": "no-cors"}).status_code == 403
    assert client().get("/api/state", headers=foreign | {"sec-fetch-mode": "navigate"}).status_code == 403
    assert client().get("/files/0/views.png", headers={"sec-fetch-site": "same-site"}).status_code == 403
    assert client().get("/api/state", headers={"sec-fetch-site": "same-origin"}).status_code == 200


@pytest.mark.parametrize("method", ["PUT", "DELETE", "OPTIONS", "TRACE", "PATCH"])
def test_other_methods_are_refused(method):
    assert client().request(method, "/").status_code == 405


def test_bodies_have_a_limit():
    assert client().post("/api/views", content=b"x" * guard.MAX_BODY).status_code == 200
    answer = client().post("/api/views", content=b"x" * (guard.MAX_BODY + 1))
    assert (answer.status_code, answer.json()) == (413, {"error": "That is too much text."})
    assert client().post("/api/photos", content=b"x" * (guard.MAX_BODY + 1)).status_code == 200
    own = (b"host", OWN.encode())
    for length, status in (
        (b"33554432", 200),
        (b"33554433", 413),
        (b"-1", 411),
        (b"1e3", 411),
        ("²".encode("latin-1"), 411),
    ):
        assert raw([own, (b"content-length", length)], "POST", "/api/photos") == status
    chunked = (b"transfer-encoding", b"chunked")
    for headers in ([own, chunked], [own, (b"content-length", b"5"), chunked]):  # the length is not what is sent
        for method, path in (("POST", "/api/photos"), ("POST", "/sign-in"), ("GET", "/")):
            assert raw(headers, method, path) == 411
    assert raw([own, (b"content-length", b"9" * 5000)], "POST", "/") == 411
    assert raw([own, (b"content-length", b"1"), (b"content-length", b"2")], "POST", "/") == 411
    assert client().get("/?" + "x" * guard.MAX_URL).status_code == 414


async def sends(app, path: str, parts: list[bytes], stalls: bool = False) -> list[dict]:
    """What comes back to a client that says it sends 5 bytes, and sends these parts: all of its body, or it stalls."""
    sent, left = [], list(parts)

    async def send(message):
        sent.append(message)

    async def receive():
        if not left:
            await asyncio.Event().wait()
        return {"type": "http.request", "body": left.pop(0), "more_body": bool(left) or stalls}

    headers = [(b"host", OWN.encode()), (b"content-length", b"5")]
    await app({"type": "http", "method": "POST", "path": path, "query_string": b"", "headers": headers}, receive, send)
    return sent


@pytest.mark.parametrize(("token", "path"), [(None, "/api/views"), (TOKEN, "/sign-in")])
def test_a_body_is_counted_as_it_comes(token, path):
    """Whatever its length was said to be; who reads it is told that the client has gone, and answers to nobody."""
    read = []

    async def reads(scope, receive, send):
        message = {"type": "http.request", "more_body": True}
        while message.get("more_body"):
            read.append(message := await receive())
        await echo(scope, receive, send)

    sent = asyncio.run(sends(Guard(reads, token), path, [b"x" * 1000] * 1000))
    assert [message.get("status") for message in sent] == [413, None]
    assert json.loads(sent[1]["body"]) == {"error": "That is too much text."}
    if token is None:
        assert sum(len(message.get("body", b"")) for message in read) == guard.MAX_BODY // 1000 * 1000
        assert read[-1] == {"type": "http.disconnect"}


@pytest.mark.parametrize(("token", "path"), [(None, "/api/views"), (TOKEN, "/sign-in"), (TOKEN, "/api/views")])
def test_a_body_that_stalls_is_waited_for_so_long(token, path, monkeypatch):
    monkeypatch.setattr(guard, "BODY_S", 0.05)

    async def ask():
        return await asyncio.wait_for(sends(Guard(echo, token), path, [b"x"], stalls=True), 60)

    sent = asyncio.run(ask())
    if path == "/api/views" and token:  # nobody reads what a stranger sends
        assert sent[0]["status"] == 401
    else:
        assert [message.get("status") for message in sent] == [408, None]
        assert json.loads(sent[1]["body"]) == {"error": "What was sent took too long to arrive; send it again."}


def test_an_answer_may_take_longer_than_a_body(monkeypatch):
    monkeypatch.setattr(guard, "BODY_S", 0.0)

    async def slow(scope, receive, send):
        body = await guard._body(receive)
        await asyncio.wait({asyncio.ensure_future(receive())}, timeout=0.1)  # until the client leaves
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": body})

    assert asyncio.run(sends(Guard(slow), "/", [b"12345"]))[1]["body"] == b"12345"


def test_every_answer_says_what_a_browser_must_not_do():
    for answer in (client().get("/"), client().get("/", headers={"host": "evil.example"}), client(TOKEN).get("/")):
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert "frame-ancestors 'none'" in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["cross-origin-resource-policy"] == "same-origin"


def test_without_the_token_there_is_only_the_way_in():
    page = client(TOKEN, host="studio.example:7008")
    assert (page.get("/").status_code, page.get("/").text) == (401, "<form>")
    assert page.get("/style.css").status_code == 200
    for path in ("/api/state", "/page.js", "/files/0/views.png", "/sign-in"):
        answer = page.get(path)
        assert (answer.status_code, list(answer.json())) == (401, ["error"])
    for word in ("", "Bearer", "Bearer ", f"Bearer {TOKEN[:-1]}", "Bearer é", f"Basic {TOKEN}"):
        assert page.get("/api/state", headers={"authorization": word.encode("latin-1")}).status_code == 401
    assert page.get("/api/state", headers={"authorization": f"Bearer {TOKEN}"}).status_code == 200


def test_the_token_is_exchanged_for_a_cookie():
    page = client(TOKEN, host="studio.example:7008")
    for wrong in ({"token": TOKEN[:-1]}, {"token": ""}, {}, {"word": TOKEN}):
        answer = page.post("/sign-in", data=wrong)
        assert (answer.status_code, answer.text) == (401, "<form>")
    answer = page.post("/sign-in", data={"token": TOKEN})
    assert (answer.status_code, answer.headers["location"]) == (303, "./")
    cookie = answer.headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=Strict" in cookie
    assert TOKEN not in cookie
    assert page.get("/api/state").status_code == 200  # by the cookie, also after a restart
    page.cookies.set(guard.COOKIE, "0" * 64)
    assert client(TOKEN).get("/api/state", headers={"cookie": f"{guard.COOKIE}={'0' * 64}"}).status_code == 401
    assert (
        client("another-token-than-that").get("/api/state", headers={"cookie": cookie.split(";")[0]}).status_code == 401
    )


def test_cookies_of_other_servers_of_this_host_do_not_hide_ours():
    page = client(TOKEN)
    page.post("/sign-in", data={"token": TOKEN})
    ours = f"{guard.COOKIE}={page.cookies[guard.COOKIE]}"
    page.cookies.clear()
    wrong = f"{guard.COOKIE}={'0' * 64}"
    for foreign in ("a", 'a="', "a=b c", "a={1,2}", "a@b=1", "=;", "é=ü", wrong):
        for line in (f"{foreign}; {ours}", f"{ours}; {foreign}", f"{foreign};{ours} ; x=y"):
            assert page.get("/api/state", headers={"cookie": line.encode()}).status_code == 200, line
    for line in (f"x{ours}", f"a={ours}", f"{ours}0", f'{guard.COOKIE}"={ours}', wrong):
        assert page.get("/api/state", headers={"cookie": line}).status_code == 401, line


def test_a_wrong_token_takes_its_time(monkeypatch):
    waited = []

    async def sleep(seconds):
        waited.append(seconds)

    monkeypatch.setattr(guard, "WRONG_TOKEN_S", 1.0)
    monkeypatch.setattr(guard.asyncio, "sleep", sleep)
    client(TOKEN).post("/sign-in", data={"token": "guess"})
    assert waited == [1.0]


@pytest.mark.parametrize(
    ("path", "headers", "waits"),
    [
        ("/api/state", {"authorization": "Bearer guess"}, True),
        ("/api/state", {"authorization": "guess"}, True),
        ("/", {"cookie": f"{guard.COOKIE}=guess"}, True),
        ("/api/state", {"cookie": f"{guard.COOKIE}=guess"}, True),
        ("/", {}, False),
        ("/api/state", {}, False),
        ("/", {"cookie": "another=word"}, False),
        ("/api/state", {"authorization": f"Bearer {TOKEN}", "cookie": f"{guard.COOKIE}=guess"}, False),
        ("/style.css", {"authorization": "Bearer guess"}, False),
    ],
)
def test_a_wrong_word_takes_its_time_however_it_comes(path, headers, waits, monkeypatch):
    waited = []

    async def sleep(seconds):
        waited.append(seconds)

    monkeypatch.setattr(guard, "WRONG_TOKEN_S", 1.0)
    monkeypatch.setattr(guard.asyncio, "sleep", sleep)
    client(TOKEN).get(path, headers=headers)
    assert waited == [1.0] * waits


async def ask(app, word: str, gone: asyncio.Event) -> int:
    """The status of a request with this word, from a client that stays until it is `gone`."""
    sent, messages = [], [{"type": "http.request", "body": b"", "more_body": True}, {"type": "http.request"}]

    async def send(message):
        sent.append(message)

    async def receive():
        if messages:
            return messages.pop(0)
        await gone.wait()
        return {"type": "http.disconnect"}

    headers = [(b"host", OWN.encode()), (b"authorization", f"Bearer {word}".encode())]
    scope = {"type": "http", "method": "GET", "path": "/api/state", "query_string": b"", "headers": headers}
    await app(scope, receive, send)
    return sent[0]["status"]


def test_many_guesses_at_once_are_answered_one_after_the_other(monkeypatch):
    """Who knows the token is answered meanwhile, and a client that leaves waits no longer."""
    asleep, most, wake = 0, 0, asyncio.Event()

    async def sleep(_):
        nonlocal asleep, most
        asleep += 1
        most = max(most, asleep)
        await wake.wait()
        asleep -= 1

    async def all_of_them():
        app, stays, leaves = Guard(echo, TOKEN, b"<form>"), asyncio.Event(), asyncio.Event()
        guesses = [asyncio.create_task(ask(app, f"guess{i}", stays)) for i in range(5)]
        left = asyncio.create_task(ask(app, "guess", leaves))
        assert await ask(app, TOKEN, stays) == 200
        leaves.set()
        await left
        assert not any(guess.done() for guess in guesses)
        wake.set()
        assert await asyncio.gather(*guesses) == [401] * 5

    monkeypatch.setattr(guard.asyncio, "sleep", sleep)
    asyncio.run(all_of_them())
    assert most == 1


def test_a_broken_cookie_or_form_is_a_wrong_one():
    page = client(TOKEN)
    for cookie in (b"=;\x00", b"mvdream_fast", b'mvdream_fast="', b"\xff=\xff"):
        assert page.get("/api/state", headers={"cookie": cookie}).status_code == 401
    for body in (b"\xff\xfe", b"&" * 100, b"token=" + b"a" * 60000, json.dumps({"token": TOKEN}).encode()):
        assert page.post("/sign-in", content=body).status_code == 401


def test_no_socket_is_opened():
    with pytest.raises(WebSocketDisconnect), client().websocket_connect("/"):
        pass
