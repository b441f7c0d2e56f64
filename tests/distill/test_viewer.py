"""The live page: on the loopback alone, for its own address alone, read-only, and no trace of it in the run's bytes."""

import http.client
import socket

import pytest
import torch
from reference.studio import TINY, Studio, fresh_asset, same
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from mvdream_fast.core import loopback
from mvdream_fast.core.errors import ArgumentError
from mvdream_fast.core.rng import Stream
from mvdream_fast.distill import viewer
from mvdream_fast.distill.config import replaced


def test_nothing_is_printed_but_what_we_say(capsys):
    page = viewer.Viewer()
    page.close()
    assert capsys.readouterr().out == ""


@pytest.fixture(scope="module")
def live():
    page = viewer.Viewer(title="a *red* ball")
    yield page
    page.close()


def request(port: int, **headers: str) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.putrequest("GET", "/", skip_host=True)
    for name, value in headers.items():
        connection.putheader(name, value)
    connection.endheaders()
    return connection.getresponse().status


def test_it_answers_to_its_own_name_only(live):
    own = f"127.0.0.1:{live.port}"
    assert request(live.port, Host=own) == 200
    assert request(live.port, Host=f"localhost:{live.port}") == 200
    assert request(live.port, Host=own, Origin=f"http://{own}") == 200
    for host in ("rebound.example", f"rebound.example:{live.port}", "127.0.0.1:1", "127.0.0.1", "[::1", ""):
        assert request(live.port, Host=host) == 403
    for origin in ("http://rebound.example", "null", f"http://127.0.0.1.example:{live.port}"):
        assert request(live.port, Host=own, Origin=origin) == 403
    assert request(live.port) in (400, 403)


def open_socket(port: int, origin: str | None = None):
    import viser

    protocol = f"viser-v{viser.__version__}"
    return connect(f"ws://127.0.0.1:{port}", origin=origin, subprotocols=[protocol], proxy=None, max_size=None)


def test_another_sites_page_gets_no_socket(live):
    with pytest.raises(InvalidStatus, match="403"):
        open_socket(live.port, "http://rebound.example")
    with open_socket(live.port, f"http://127.0.0.1:{live.port}") as ours:
        assert len(ours.recv(timeout=20)) > 16


def test_other_addresses_are_refused(live):
    others = ["127.0.0.2"]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing; tells which address of ours would be used
            others.append(probe.getsockname()[0])
        except OSError:
            pass  # a machine without any network
    for address in others:
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((address, live.port), timeout=5).close()


def send_garbage(port: int, frames: int) -> None:
    draw = Stream(frames, 0, "frames")
    for _ in range(frames // 20):
        with open_socket(port) as client:
            for _ in range(20):
                size = int(draw.integers(0, 200))
                data = bytes(draw.integers(0, 256, size).tolist())
                try:
                    client.send(data)
                except Exception:
                    break  # the server has closed this connection, as it may


def test_broken_frames_do_no_harm(live):
    send_garbage(live.port, 100)
    assert request(live.port, Host=f"127.0.0.1:{live.port}") == 200


@pytest.mark.slow
def test_ten_thousand_broken_frames_do_no_harm(live):
    send_garbage(live.port, 10_000)
    assert request(live.port, Host=f"127.0.0.1:{live.port}") == 200


def test_no_browser_can_change_or_publish_anything(live):
    assert not live._server._websock_server._incoming_handlers
    assert live._server.request_share_url() is None


def test_the_next_free_port_is_taken_and_told(live):
    other = viewer.Viewer(live.port)
    try:
        assert other.port > live.port
        assert f"http://127.0.0.1:{other.port}" in other.describe()
        assert f"ssh -L {other.port}:127.0.0.1:{other.port} " in other.describe()
    finally:
        other.close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", other.port), timeout=5).close()


def test_ports_can_run_out(monkeypatch):
    monkeypatch.setattr(loopback, "PORTS_TRIED", 1)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ArgumentError, match="the 1 ports from .* are taken"):
            loopback.free_port(taken.getsockname()[1], "--viewer-port")


def test_a_server_without_the_guard_is_not_used(monkeypatch):
    import contextlib

    monkeypatch.setattr(viewer, "_guarded", contextlib.nullcontext)
    with pytest.raises(ArgumentError, match="does not let requests be checked"):
        viewer.Viewer()


def test_watching_leaves_no_trace_in_the_run(live):
    live.every_s, shown = 0.0, []
    config = replaced(TINY, steps=4)
    look = lambda progress: shown.append(live.update(progress.asset, progress.record.step + 1))  # noqa: E731
    watched = Studio()("x", config=config, callback=look)
    assert shown[0]
    assert same(watched.state(), Studio()("x", config=config).state())
    live.every_s = viewer.EVERY_S


def test_refreshes_are_spaced_and_an_empty_volume_is_told(live):
    live._next = 0.0
    asset = fresh_asset(TINY)
    assert live.update(asset, 1)
    assert not live.update(asset, 2)
    live._next = 0.0
    asset.representation.density = lambda positions: torch.zeros(len(positions))
    assert live.update(asset, 3)
    assert "step 3: no surface yet" in live._text.content
    live._next = 0.0
    assert live.update(asset, 4, "stage 2 of 2 (tets)")
    assert live._text.content.endswith("step 4, stage 2 of 2 \\(tets\\): no surface yet")
