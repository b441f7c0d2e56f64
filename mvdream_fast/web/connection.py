"""One client's connection, which it cannot hold for ever by saying nothing, or not all that it began to say.

The server takes but so many connections. What takes long to answer is not counted here, and a body that an answer waits
for is the guard's to wait for.
"""

import asyncio
from collections.abc import Iterable
from typing import Any, Literal

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

AT_ONCE = 100  # connections, and requests; more are told to come back
SPARED = AT_ONCE // 2  # connections; where there are more, a new one takes the place of one that keeps us waiting
WAIT_S = 10.0  # for the head of a request, or for what is left of the body of an answered one


class Connection(H11Protocol):
    """uvicorn's, with a deadline while the client has to speak."""

    _waits_for: Literal["head", "rest"] | None = None
    _timer: asyncio.TimerHandle | None = None
    _heard = 0.0

    def connection_made(self, transport: Any) -> None:
        """Closes the one that has been silent for longest where there are many."""
        super().connection_made(transport)
        self._heard = self.loop.time()
        self._wait()
        _make_room(self.connections)

    def data_received(self, data: bytes) -> None:
        """Some bytes do not move a deadline: only all that was waited for ends it."""
        self._heard = self.loop.time()
        super().data_received(data)
        self._wait()

    def on_response_complete(self) -> None:
        """Waits for the next request."""
        super().on_response_complete()
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        """Waits no longer."""
        self._wait_for(None)
        super().connection_lost(exc)

    def is_late(self) -> bool:
        """Whether we wait for the client rather than the client for us."""
        return self.conn.their_state in (h11.IDLE, h11.SEND_BODY) and not self.transport.is_closing()

    def _wait(self) -> None:
        answered = self.conn.our_state is h11.DONE
        if self.conn.their_state is h11.IDLE:
            self._wait_for("head")
        else:
            self._wait_for("rest" if answered and self.conn.their_state is h11.SEND_BODY else None)

    def _wait_for(self, what: Literal["head", "rest"] | None) -> None:
        if what == self._waits_for:
            return
        self._waits_for = what
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self.loop.call_later(WAIT_S, self.transport.close) if what else None


def _make_room(connections: Iterable[Any]) -> None:
    late = [connection for connection in connections if connection.is_late()]
    if len(late) > SPARED:
        min(late, key=lambda connection: connection._heard).transport.close()
