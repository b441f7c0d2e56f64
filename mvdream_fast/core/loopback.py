"""Pages that this machine alone can open: a free port of the loopback, who may ask there, the way in from elsewhere."""

import errno
import socket
from urllib.parse import urlsplit

from mvdream_fast.core.errors import ArgumentError

HOST = "127.0.0.1"
NAMES = {"127.0.0.1", "::1", "localhost"}
PORTS_TRIED = 100


def free_port(port: int, flag: str, host: str = HOST) -> int:
    """The first port from `port` that is free at all of the host's addresses that this machine has.

    Raises: ArgumentError, naming the `flag`, when a hundred are taken; naming --host, when it is none of this machine.
    """
    addresses = _addresses(host)
    for candidate in range(port, min(port + PORTS_TRIED, 65536)):
        if _is_free(addresses, candidate, host):
            return candidate
    raise ArgumentError(f"{flag}: the {PORTS_TRIED} ports from {port} on are taken; name another")


def _addresses(host: str) -> list[tuple[int, tuple]]:
    """Family and address of each that a host stands for; an empty name stands for all of this machine's."""
    try:
        found = socket.getaddrinfo(host or None, 0, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, ValueError):  # ValueError: what cannot be a name at all
        raise ArgumentError(f"--host {host} is no name or address that can be found; leave it out") from None
    return [(family, address) for family, _, _, _, address in found]


def _is_free(addresses: list[tuple[int, tuple]], port: int, host: str) -> bool:
    """Whether nobody listens there. An address that this machine has not is passed over, unless it has none of them."""
    why = None
    n_bound = 0
    for family, address in addresses:
        try:
            with socket.socket(family) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:  # as asyncio binds it: the same port of IPv4 may be another's
                    probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                probe.bind((address[0], port, *address[2:]))
                n_bound += 1
        except OSError as error:
            if error.errno in (errno.EADDRINUSE, errno.EACCES):
                return False
            why = error.strerror
    if not n_bound:
        raise ArgumentError(f"--host {host} is no address of this machine ({why}); leave it out, or name one that is")
    return True


def in_url(host: str) -> str:
    """A host as addresses have it: IPv6 in brackets."""
    return f"[{host}]" if ":" in host else host


def has_loopback_name(address: str, port: int | None = None) -> bool:
    """Whether an address (http://..., or //... for a bare host) is this machine's own, at `port` where one is named."""
    try:
        parts = urlsplit(address)
        return parts.hostname in NAMES and port in (None, parts.port)
    except ValueError:
        return False


def tunnel(port: int, host: str = HOST) -> str:
    """What to type on another machine to open the page there."""
    return f"ssh -L {port}:{in_url(host)}:{port} {socket.gethostname()}"
