"""Says at once that another process of a run is gone, where a collective call would wait for minutes or for ever.

Each process holds a connection to the first one, which the system closes with whoever dies; keep-alive finds machines
that lost their power. What the processes compute together is processes.py's. A leaf, without torch.
"""

import contextlib
import os
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator

from mvdream_fast.core.processes import Ranks

BYE, FAILED, LOST = b"b", b"f", b"l"  # what a process says: it has done, it has an error, another one is gone
NEWS_S = 5.0  # within which a death is known to all
GRACE_S = 20.0  # longer; for the others to come to the same error by themselves
MEETING_S = 600.0  # for all to come to the first one
EXIT_CODE = 1
KEEP_ALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}  # 25 seconds without an answer


@contextlib.contextmanager
def watched(ranks: Ranks, host: str, say: Callable[[str], None] | None = None) -> Iterator[None]:
    """Inside, the death of any process ends all others with exit code 1, and one sentence from one of them.

    One that leaves with an error leaves the others GRACE_S seconds to have it, too. All processes enter together;
    `host` is the first one's address.
    """
    if ranks.world == 1:
        yield
        return
    watch = _Watch(ranks, host, say or (lambda text: print(f"train: {text}", file=sys.stderr, flush=True)))
    try:
        yield
    except BaseException:
        watch.leave(FAILED)
        raise
    watch.leave(BYE)


class _Watch:
    def __init__(self, ranks: Ranks, host: str, say: Callable[[str], None]):
        self.ranks, self.say = ranks, say
        self.peers = _peers(ranks, host)
        self.leaving = False
        self.thread = threading.Thread(target=self._listen, daemon=True, name="watch")
        self.thread.start()

    def leave(self, word: bytes) -> None:
        """Tells the others how this process ends. After an error it waits a little for news that would explain it."""
        self.leaving = word == BYE
        for peer in self.peers.values():
            with contextlib.suppress(OSError):
                peer.sendall(word)
        if word == FAILED:
            self.thread.join(NEWS_S)
        self.leaving = True

    def _listen(self) -> None:
        """Until every process at the other ends has said how it ends, or one is gone without a word."""
        with selectors.DefaultSelector() as selector:
            for rank, peer in self.peers.items():
                selector.register(peer, selectors.EVENT_READ, rank)
            deadline, failed = None, 0
            while selector.get_map():
                left = None if deadline is None else max(0.0, deadline - time.monotonic())
                found = selector.select(left)
                if not found:
                    self._end(f"process {failed} of {self.ranks.world} has ended with an error of its own")
                for rank in (key.data for key, _ in found):
                    word = _received(self.peers[rank])
                    selector.unregister(self.peers[rank])
                    if word == FAILED:
                        deadline, failed = deadline or time.monotonic() + GRACE_S, rank
                    elif word != BYE:
                        self._end(f"process {rank} of {self.ranks.world} is gone", quiet=word == LOST)

    def _end(self, what: str, quiet: bool = False) -> None:
        if self.leaving:
            return
        for peer in self.peers.values() if self.ranks.first else ():
            with contextlib.suppress(OSError):
                peer.sendall(LOST)
        # Where the first one is gone, the second one speaks.
        if not quiet and self.ranks.rank <= 1:
            self.say(f"{what}; the others stop, and --resume goes on from the latest checkpoint")
        os._exit(EXIT_CODE)


def _received(peer: socket.socket) -> bytes:
    try:
        return peer.recv(1)
    except OSError:
        return b""


def _peers(ranks: Ranks, host: str) -> dict[int, socket.socket]:
    """The first process' connections to all others; of another one, that to the first."""
    if ranks.first:
        family = socket.getaddrinfo(host, None)[0][0]
        server = socket.create_server((host, 0), family=family, backlog=ranks.world)
        ranks.largest(server.getsockname()[1])
        with server:
            server.settimeout(MEETING_S)
            accepted = [server.accept()[0] for _ in range(ranks.world - 1)]
        peers = {int.from_bytes(_exactly(peer, 4)): peer for peer in accepted}
    else:
        peer = socket.create_connection((host, ranks.largest(0)[0]))
        peer.sendall(ranks.rank.to_bytes(4))
        peers = {0: peer}
    for peer in peers.values():
        peer.settimeout(None)
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in KEEP_ALIVE.items():
            if hasattr(socket, name):
                peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return peers


def _exactly(peer: socket.socket, n: int) -> bytes:
    data = b""
    while len(data) < n:
        data += peer.recv(n - len(data))
    return data
