"""The page's server and its workers, from their start to their end, in one process and its children."""

import signal
import threading
from collections.abc import Callable, Sequence

import uvicorn

from mvdream_fast.core.errors import UserError
from mvdream_fast.jobs.local import Workers
from mvdream_fast.web.connection import AT_ONCE, Connection
from mvdream_fast.web.guard import App

TEND_S = 1.0
GRACE_S = 60.0  # for workers to save what is at work


def run(app: App, host: str, port: int, staff: Sequence[Workers], say: Callable[[str], None]) -> None:
    """Answers until a signal comes; what is at work then is saved, and goes on with the next start.

    Raises: UserError where workers die again and again.
    """
    server = uvicorn.Server(config_of(app, host, port))
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # a background job of a shell: it would end with code 0
        signal.signal(signal.SIGINT, signal.default_int_handler)
    tender = _Tender(staff, server)
    for workers in staff:
        workers.start()
    tender.start()
    try:
        server.run()
    finally:
        tender.end.set()
        tender.join()
        say("stopping: what is at work is saved, and goes on when the same command is given again")
        for workers in staff:
            workers.stop(GRACE_S)
    if tender.error is not None:
        raise tender.error


def config_of(app: App, host: str, port: int) -> uvicorn.Config:
    """How the page is served."""
    return uvicorn.Config(
        app, host, port, log_level="warning", access_log=False, server_header=False, lifespan="off", ws="none",
        http=Connection, loop="asyncio", limit_concurrency=AT_ONCE, timeout_graceful_shutdown=2,
    )  # fmt: skip


class _Tender(threading.Thread):
    """Starts workers again that have died, and stops the server where that is of no use."""

    def __init__(self, staff: Sequence[Workers], server: uvicorn.Server):
        super().__init__(daemon=True, name="tender")
        self.end, self.error = threading.Event(), None
        self._staff, self._server = staff, server

    def run(self) -> None:
        """Until `end`, or a signal to the server: a terminal sends it to the workers, too, which leave by it."""
        while not self.end.wait(TEND_S) and not self._server.should_exit:
            try:
                for workers in self._staff:
                    workers.tend()
            except UserError as error:
                self.error = error
                self._server.should_exit = True
                return
