"""Pages that this machine alone can open: a free port of the loopback, who may ask there, the way in from elsewhere."""

import socket
from urllib.parse import urlsplit

from mvdream_fast.core.errors import ArgumentError

HOST = "127.0.0.1"
NAMES = {"127.0.0.1", "localhost"}
PORTS_TRIED = 100


def free_port(port: int, flag: str, host: str = HOST) -> int:
    """The first port from `port` that is free. Raises ArgumentError, naming the `flag`, when a hundred are taken."""
    for candidate in range(port, min(port + PORTS_TRIED, 65536)):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, candidate))
            except OSError:
                continue
            return candidate
    raise ArgumentError(f"{flag}: the {PORTS_TRIED} ports from {port} on are taken; name another")


def has_loopback_name(address: str, port: int | None = None) -> bool:
    """Whether an address (http://..., or //... for a bare host) is this machine's own, at `port` where one is named."""
    try:
        parts = urlsplit(address)
        return parts.hostname in NAMES and port in (None, parts.port)
    except ValueError:
        return False


def tunnel(port: int) -> str:
    """What to type on another machine to open the page there."""
    return f"ssh -L {port}:{HOST}:{port} {socket.gethostname()}"
