"""The live page of a run: the growing asset to turn in a browser, served by viser on this machine's loopback alone.

The page only shows: what a browser sends is dropped but for its camera (viser would else take uploads, and open a
public tunnel for any client that asks), and what is shown is read from the volume without a random draw, so that a run
has the same bytes with and without it. A page of another site cannot read it: requests whose Host or Origin is not this
address are refused (DNS rebinding).
"""

import contextlib
import io
import logging
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from http import HTTPStatus
from typing import Any

from mvdream_fast.core import loopback
from mvdream_fast.core.errors import ArgumentError, DivergedError
from mvdream_fast.core.images import to_bytes
from mvdream_fast.scene.asset import Asset

EVERY_S = 5.0  # between two refreshes
MOST_OF_THE_TIME = 0.05  # a refresh may take this share of the run's time
RESOLUTION = 64


class Viewer:
    """A page on 127.0.0.1 that shows the last mesh it was given. Close it with the run.

    Raises:
        ArgumentError: viser is not installed, no port is free, or the guard against foreign pages is not in place.
    """

    def __init__(self, port: int = 7007, title: str = "", every_s: float = EVERY_S):
        self.every_s = every_s
        self._next = 0.0
        self._server = _start(loopback.free_port(port, "--viewer-port"))
        self.port = self._server.get_port()
        self._server.gui.configure_theme(show_share_button=False, show_logo=False)
        self._server.scene.set_up_direction("+z")
        self._server.initial_camera.position = (0.9, -2.4, 0.8)
        self._server.initial_camera.look_at = (0.0, 0.0, 0.0)
        self._text = self._server.gui.add_markdown(_escaped(title))
        self._title = title

    @property
    def url(self) -> str:
        """The page's address, on this machine only."""
        return f"http://{loopback.HOST}:{self.port}"

    def describe(self) -> str:
        """Where the page is, and how to reach it from another machine."""
        return f"live view: {self.url} (this machine only; from another one: {loopback.tunnel(self.port)})"

    def update(self, asset: Asset, step: int, stage: str = "") -> bool:
        """Shows the asset as it is, unless the last refresh was a moment ago. Returns whether it did.

        stage: which of several it is, as the page says it.

        Only reads the volume. While there is no surface yet, the page keeps what it shows.
        """
        start = time.perf_counter()
        if start < self._next:
            return False
        where = f"step {step}, {_escaped(stage)}" if stage else f"step {step}"
        try:
            self.show(asset)
            self._text.content = f"{_escaped(self._title)}\n\n{where}"
        except DivergedError:
            self._text.content = f"{_escaped(self._title)}\n\n{where}: no surface yet"
        taken = time.perf_counter() - start
        self._next = time.perf_counter() + max(self.every_s, taken / MOST_OF_THE_TIME)
        return True

    def show(self, asset: Asset) -> None:
        """Replaces the mesh on the page. Raises DivergedError when the volume holds no surface."""
        import trimesh

        mesh = asset.mesh(RESOLUTION)
        colors = to_bytes(mesh.colors)
        body = trimesh.Trimesh(mesh.vertices, mesh.faces, process=False, vertex_colors=colors)
        self._server.scene.add_mesh_trimesh("/asset", body)
        self._server.flush()

    def close(self) -> None:
        """Stops the server."""
        with _silent():
            self._server.stop()


def is_ours(headers: Any, port: int) -> bool:
    """Whether a request names this page as its Host, and as its Origin where it has one."""
    hosts = headers.get_all("Host")
    if len(hosts) != 1 or not loopback.has_loopback_name(f"//{hosts[0]}", port):
        return False
    return all(loopback.has_loopback_name(origin, port) for origin in headers.get_all("Origin"))


def _start(port: int) -> Any:
    """A viser server on the loopback with the guard in place."""
    try:
        import viser
    except ImportError as error:
        raise ArgumentError("--viewer needs viser: pip install 'mvdream_fast[viewer]'") from error
    logging.getLogger("websockets").setLevel(logging.CRITICAL)  # a broken client is no concern of the run's
    with _guarded(), _silent():
        server = viser.ViserServer(loopback.HOST, port, verbose=False)
    if not _refuses_strangers(server.get_port()):
        server.stop()
        raise ArgumentError("--viewer: this version of viser does not let requests be checked; install viser 1.1")
    _close_ears(server)
    return server


def _close_ears(server: Any) -> None:
    """Drops what any browser may send to the server as a whole: changed controls, uploads, the wish to be public."""
    messages = server._websock_server
    for kind in list(messages._incoming_handlers):
        messages.unregister_handler(kind)
    server.request_share_url = lambda *_, **__: None


def _silent() -> contextlib.AbstractContextManager:
    """viser prints a banner and a goodbye, whatever its `verbose`; the address that we print is enough."""
    return contextlib.redirect_stdout(io.StringIO())


@contextlib.contextmanager
def _guarded() -> Iterator[None]:
    """While viser starts, its calls of `websockets.serve` get our check in front of their own.

    viser offers no hook; `_start` makes sure that this one took.
    """
    import websockets.asyncio.server as websockets_server
    from websockets.datastructures import Headers
    from websockets.http11 import Response

    plain = websockets_server.serve

    def serve(handler: Callable, host: str, port: int, *, process_request: Callable | None = None, **options: Any):
        def check(connection: Any, request: Any) -> Any:
            if not is_ours(request.headers, connection.local_address[1]):
                return Response(HTTPStatus.FORBIDDEN, "Forbidden", Headers({"Content-Length": "0"}), b"")
            return process_request(connection, request) if process_request else None

        return plain(handler, host, port, process_request=check, **options)

    with _PATCHING:
        websockets_server.serve = serve
        try:
            yield
        finally:
            websockets_server.serve = plain


_PATCHING = threading.Lock()


def _refuses_strangers(port: int) -> bool:
    request = urllib.request.Request(f"http://{loopback.HOST}:{port}/", headers={"Host": "stranger.example"})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        opener.open(request, timeout=10).close()
    except urllib.error.HTTPError as error:
        return error.code == HTTPStatus.FORBIDDEN
    except OSError:
        return False
    return False


def _escaped(text: str) -> str:
    """A prompt as Markdown that means nothing but itself."""
    return "".join(f"\\{c}" if c in "\\`*_{}[]()<>#+-.!|" else c for c in text)
