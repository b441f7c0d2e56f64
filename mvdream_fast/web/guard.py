"""Who may ask: in front of every request, before anything of it is read. An ASGI application around another.

Without a token only this machine's own names are answered (a page of another site that has its name point here, DNS
rebinding, comes with that name as its Host). With one, all but the way to sign in is refused to who does not know it.
Either way, no page of another origin can ask for anything, and none can show this one in a frame.
"""

import asyncio
import hashlib
import hmac
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import parse_qs, urlsplit

from mvdream_fast.core.loopback import has_loopback_name

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

MAX_BODY = 64 << 10
MAX_PHOTO = 32 << 20
MAX_URL = 16 << 10
MAX_DIGITS = 20  # of a length
LARGE = {"/api/photos": MAX_PHOTO}
BODY_S = 20.0  # in which a body must be here, and what SLOWEST takes of it on top
SLOWEST = 128 << 10  # bytes a second
OPEN = {"/style.css", "/icon.svg"}  # what the page that asks for the token is made of
COOKIE = "mvdream_fast"
WRONG_TOKEN_S = 1.0  # an answer to a wrong token, or to a wrong cookie, takes so long
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "same-origin",  # with "no-referrer" a form of our own page would say that its origin is "null"
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), microphone=(), geolocation=()",
}


class Guard:
    """`app`, for those who may ask. sign_in: the page that asks for the token; token: None for this machine's own."""

    def __init__(self, app: App, token: str | None = None, sign_in: bytes = b""):
        self.app, self.token, self.sign_in = app, token, sign_in
        self._turn = asyncio.Semaphore()  # of wrong words: many at once are guessed no faster than one after the other

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close"})  # before it is accepted: refused
            return
        headers = _headers(scope)
        status, why = _refusal(scope, headers, self.token is not None)
        exchange = _Exchange(receive, send, LARGE.get(scope["path"], MAX_BODY), headers.get("content-length", []))
        receive, send = exchange.receive, exchange.send
        if why:
            await _answer_error(send, status, why)
        elif self.token is None or scope["path"] in OPEN or self._knows(headers):
            await self.app(scope, receive, _with_headers(send))
        else:
            await self._ask_for_token(scope, headers, receive, send)

    def _knows(self, headers: dict[str, list[str]]) -> bool:
        """Whether a request carries the token, or the cookie that was given for it."""
        bearer = "".join(headers.get("authorization", [])).removeprefix("Bearer ")
        return self._is_token(bearer) or any(_same(value, self._ticket()) for value in _cookies(headers))

    def _is_token(self, word: str) -> bool:
        return self.token is not None and _same(word, self.token)

    def _ticket(self) -> str:
        """What the cookie holds: not the token, for other pages of this host may read it; the same after a restart."""
        return hmac.new((self.token or "").encode(), b"mvdream_fast serve", hashlib.sha256).hexdigest()

    async def _wait_its_turn(self, receive: Receive) -> None:
        """What an answer to a wrong word takes. Nobody who knows the right one waits here; and who leaves frees the
        place, of which a server has but so many."""

        async def turn() -> None:
            async with self._turn:
                await asyncio.sleep(WRONG_TOKEN_S)

        waits = {asyncio.ensure_future(turn()), asyncio.ensure_future(_leaves(receive))}
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()

    async def _ask_for_token(self, scope: Scope, headers: dict[str, list[str]], receive: Receive, send: Send) -> None:
        signs_in = scope["path"] == "/sign-in" and scope["method"] == "POST"
        if signs_in and self._is_token(_form(await _body(receive)).get("token", [""])[0]):
            cookie = f"{COOKIE}={self._ticket()}; Path=/; HttpOnly; SameSite=Strict"
            await _answer(send, 303, b"", {"location": "./", "set-cookie": cookie})
            return
        if signs_in or headers.get("authorization") or _cookies(headers):
            await self._wait_its_turn(receive)
        if signs_in or scope["path"] == "/":
            page = self.sign_in.replace(b" hidden>", b">") if signs_in else self.sign_in  # where it says what is wrong
            await _answer(send, 401, page, {"content-type": "text/html; charset=utf-8"})
        else:
            await _answer_error(send, 401, "Sign in with the server's token first.")


class _Exchange:
    """A request while it is answered. Where its body is longer than `limit` bytes, or takes too long to come, the
    client is told so here, and whoever reads it that the client has gone."""

    def __init__(self, receive: Receive, send: Send, limit: int, lengths: list[str]):
        self._receive, self._send, self._limit = receive, send, limit
        self._n_bytes, self._more, self._started, self._refused = 0, True, False, False
        said = int(lengths[0]) if lengths and _is_count(lengths[0]) else 0
        self._due = asyncio.get_running_loop().time() + BODY_S + min(said, limit) / SLOWEST

    async def receive(self) -> MutableMapping[str, Any]:
        """The next part of the body; after the last, until the client leaves, as long as that takes."""
        if self._refused:
            return {"type": "http.disconnect"}
        try:
            async with asyncio.timeout_at(self._due if self._more else None):
                message = await self._receive()
        except TimeoutError:
            return await self._refuse(408, "What was sent took too long to arrive; send it again.")
        self._more = message.get("more_body", False)
        self._n_bytes += len(message.get("body", b""))
        return await self._refuse(*_too_large(self._limit)) if self._n_bytes > self._limit else message

    async def send(self, message: MutableMapping[str, Any]) -> None:
        """What the application answers, unless the client has been answered here."""
        if not self._refused:
            self._started = True
            await self._send(message)

    async def _refuse(self, status: int, why: str) -> MutableMapping[str, Any]:
        self._refused = True
        if not self._started:
            await _answer_error(self._send, status, why)
        return {"type": "http.disconnect"}


def _refusal(scope: Scope, headers: dict[str, list[str]], has_token: bool) -> tuple[int, str]:
    """The status and the sentence for a request that nobody's own page would send; 0 and "" for any other."""
    hosts, origins, method = headers.get("host", []), headers.get("origin", []), scope["method"]
    if len(hosts) != 1 or not (has_token or has_loopback_name(f"//{hosts[0]}")):
        return 403, "This page answers to 127.0.0.1 and localhost only; start the server with --token for other names."
    if any(_netloc(origin) != hosts[0].lower() for origin in origins) or _is_foreign(scope, headers):
        return 403, "A page of another address may not ask for this."
    if len(scope.get("raw_path") or b"") + len(scope["query_string"]) > MAX_URL:
        return 414, "The address is too long."
    if method not in ("GET", "HEAD", "POST"):
        return 405, f"{method} is no way to ask for anything here."
    if "transfer-encoding" in headers:  # it would make any length a lie
        return 411, "A request must say how long it is."
    if method == "POST":
        return _refused_body(headers.get("content-length", []), LARGE.get(scope["path"], MAX_BODY))
    return 0, ""


def _refused_body(lengths: list[str], limit: int) -> tuple[int, str]:
    """A body must say how long it is (the server holds it to that), and not be longer than the limit."""
    if len(lengths) != 1 or not _is_count(lengths[0]):
        return 411, "A request must say how long it is."
    return _too_large(limit) if int(lengths[0]) > limit else (0, "")


def _too_large(limit: int) -> tuple[int, str]:
    return 413, f"At most {limit >> 20} MB can be sent at once." if limit >> 20 else "That is too much text."


def _is_count(length: str) -> bool:
    return length.isascii() and length.isdigit() and len(length) < MAX_DIGITS


def _is_foreign(scope: Scope, headers: dict[str, list[str]]) -> bool:
    """Whether the browser says that another site's page asks. Such a page may only lead here, by a link to the page."""
    sites = headers.get("sec-fetch-site", [])
    leads = scope["method"] == "GET" and scope["path"] == "/" and headers.get("sec-fetch-mode") == ["navigate"]
    return any(site in ("cross-site", "same-site") for site in sites) and not leads


def _netloc(origin: str) -> str:
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return ""


def _headers(scope: Scope) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, value in scope["headers"]:
        found.setdefault(name.decode("latin-1").lower(), []).append(value.decode("latin-1"))
    return found


def _cookies(headers: dict[str, list[str]]) -> list[str]:
    """The values of every cookie of our name. Cookies of other servers of this host, which lie beside it, may look
    like nothing that the standard knows: http.cookies drops ours along with them."""
    pairs = [pair.partition("=") for line in headers.get("cookie", []) for pair in line.split(";")]
    return [value.strip() for name, _, value in pairs if name.strip() == COOKIE]


def _same(word: str, secret: str) -> bool:
    """Compared in a time that does not depend on where they differ."""
    return hmac.compare_digest(word.encode(), secret.encode())


def _form(body: bytes) -> dict[str, list[str]]:
    try:
        return parse_qs(body.decode(), max_num_fields=4)
    except ValueError:
        return {}


async def _body(receive: Receive) -> bytes:
    """All of a body; what has come of it where the client has gone."""
    parts, more = [], True
    while more:
        message = await receive()
        parts.append(message.get("body", b""))
        more = message.get("more_body", False)
    return b"".join(parts)


async def _leaves(receive: Receive) -> None:
    """Until the client has closed the connection; what is left of its body is dropped."""
    message = await receive()
    while message.get("more_body", False):
        message = await receive()
    if message["type"] == "http.request":
        await receive()


async def _answer_error(send: Send, status: int, why: str) -> None:
    await _answer(send, status, json.dumps({"error": why}).encode())


async def _answer(send: Send, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
    named = {"content-type": "application/json", "content-length": str(len(body)), "cache-control": "no-store"}
    named |= headers or {}
    raw = [(name.encode(), value.encode("latin-1")) for name, value in named.items()]
    with_headers = _with_headers(send)
    await with_headers({"type": "http.response.start", "status": status, "headers": raw})
    await with_headers({"type": "http.response.body", "body": body})


def _with_headers(send: Send) -> Send:
    """Adds the headers that every answer has; those of the answer itself stay."""

    async def add(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            own = list(message.get("headers", []))
            names = {name.lower() for name, _ in own}
            more = [(name.encode(), value.encode()) for name, value in HEADERS.items() if name.encode() not in names]
            message = {**message, "headers": own + more}
        await send(message)

    return add
