"""Connections over real sockets: silent and slow ones are closed, and never keep others out."""

import contextlib
import socket
import threading
import time

import pytest
import uvicorn
from reference.until import until

from mvdream_fast.web import connection, server

WAIT_S = 60.0  # of a busy machine
GET = b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"


async def app(scope, receive, send):
    """Answers at once, and reads no body."""
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


@pytest.fixture
def port():
    """Of the page's server, in a thread."""
    running = uvicorn.Server(server.config_of(app, "127.0.0.1", 0))
    thread = threading.Thread(target=running.run, daemon=True)
    thread.start()
    until(lambda: running.started, WAIT_S)
    yield running.servers[0].sockets[0].getsockname()[1]
    running.should_exit = True
    thread.join(WAIT_S)


@contextlib.contextmanager
def connected(port: int, sent: bytes = b""):
    with socket.create_connection(("127.0.0.1", port), WAIT_S) as client:
        client.sendall(sent)
        yield client


def status(client) -> bytes:
    """Of a whole answer."""
    answer = b""
    while not answer.endswith(b"ok"):
        answer += client.recv(4096)
    return answer.split(b"\r\n")[0]


def is_closed_while_we_send(client) -> bool:
    """One byte after the other, for ten seconds."""
    try:
        for _ in range(100):
            client.sendall(b"x")
            time.sleep(0.1)
    except OSError:
        return True
    return False


def is_closed(client) -> bool:
    try:
        return client.recv(4096) == b""
    except ConnectionResetError:
        return True


@pytest.mark.parametrize("sent", [b"", GET[:9]])
def test_a_head_that_does_not_come_is_not_waited_for(port, sent, monkeypatch):
    monkeypatch.setattr(connection, "WAIT_S", 0.2)
    with connected(port, sent) as client:
        assert is_closed(client)


def test_single_bytes_do_not_move_the_deadline(port, monkeypatch):
    monkeypatch.setattr(connection, "WAIT_S", 1.0)
    with connected(port, GET[:-2]) as client:
        assert is_closed_while_we_send(client)


def test_what_is_left_of_an_answered_body_is_not_waited_for(port, monkeypatch):
    monkeypatch.setattr(connection, "WAIT_S", 0.5)
    with connected(port, b"POST / HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 1000\r\n\r\nx") as client:
        assert status(client) == b"HTTP/1.1 200 OK"
        assert is_closed_while_we_send(client)


def test_a_client_that_speaks_is_heard_again_and_again(port, monkeypatch):
    monkeypatch.setattr(connection, "WAIT_S", 2.0)
    with connected(port) as client:
        for _ in range(5):
            time.sleep(0.5)
            client.sendall(GET)
            assert status(client) == b"HTTP/1.1 200 OK"


def test_silent_connections_keep_nobody_out(port):
    with contextlib.ExitStack() as stack:
        silent = [stack.enter_context(connected(port, GET[: i % 2])) for i in range(2 * connection.AT_ONCE)]
        with connected(port, GET) as client:
            assert status(client) == b"HTTP/1.1 200 OK"
        assert is_closed(silent[0])  # the oldest made room
