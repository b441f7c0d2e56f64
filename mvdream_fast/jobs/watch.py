"""Looks after a queue while its workers are at it: starts again who died, one line of progress, the two pages."""

import sys
import time
from collections.abc import Callable, Collection
from typing import Protocol

from mvdream_fast.core.errors import UserError
from mvdream_fast.core.run_folder import Interrupt
from mvdream_fast.jobs import page
from mvdream_fast.jobs.job import State
from mvdream_fast.jobs.queue import Queue
from mvdream_fast.jobs.setup import CLEAR
from mvdream_fast.jobs.workspace import prune

TEND_S = 0.2
PAGE_S = 2.0  # between two looks at all jobs; longer where such a look takes more than SHARE of the time
SHARE = 0.01
REASONS = {
    State.CANCELLED: "cancelled",
    State.QUEUED: "no worker is left to make it; the same command goes on",
    State.RUNNING: "a worker that is gone has begun it; the same command goes on",
}
LINE_S = 10.0  # between two lines where there is no terminal


class Crew(Protocol):
    """Workers, wherever they are."""

    def start(self) -> None:
        """Starts all."""
        ...

    def tend(self) -> bool:
        """Starts again who has died. False once all have ended as they should."""
        ...

    def stop(self) -> None:
        """Asks all to save and to leave, and waits for them."""
        ...


class Watch:
    """One command's look at a queue. say: prints a line. live: the line is written over itself, on a terminal."""

    def __init__(self, queue: Queue, say: Callable[[str], None], live: bool):
        self._queue, self._say, self._live = queue, say, live
        self._start = self._next = self._told = time.monotonic()
        self._line, self._done_before = "", sum(status.state == State.DONE for _, status in queue.jobs())

    def tend(self, crew: Crew, interrupt: Interrupt) -> None:
        """Until all is done, or `interrupt` is requested; then all have saved and left. Raises UserError."""
        crew.start()
        try:
            while interrupt.requested is None and crew.tend():
                if time.monotonic() >= self._next:
                    self.look()
                time.sleep(TEND_S)
        finally:
            crew.stop()
            self.look(live=False)

    def look(self, live: bool = True) -> None:
        """Shows where all jobs stand."""
        begin = time.monotonic()
        try:
            rows = self._queue.jobs()
            line = page.line(rows, begin - self._start, self._done_before)
            page.write_pages(self._queue.store, rows, line, live)
            if not live:
                prune(self._queue.store, [job for job, status in rows if status.state == State.DONE])
        except UserError as error:  # a full disk, for one: the workers wait for it, too
            line = str(error)
        self._tell(line, live)
        end = time.monotonic()
        self._next = end + max(PAGE_S, (end - begin) / SHARE)

    def _tell(self, line: str, live: bool) -> None:
        if self._live and live:
            print(f"{CLEAR}{line}", end="", flush=True)
        elif not live or (line != self._line and time.monotonic() - self._told > LINE_S):
            self._say(line)
            self._line, self._told = line, time.monotonic()


def failures(queue: Queue, ids: Collection[str], verb: str) -> int:
    """Says on stderr, as the command `verb`, which of these jobs were not made, and why. Returns the exit code of the
    first that failed or was cancelled; 1 where all others only wait or run, 0 where all are done."""
    missing = [(job, status) for job, status in queue.jobs() if job.id in ids and status.state != State.DONE]
    for job, status in missing:
        reason = status.message if status.state == State.FAILED else REASONS[status.state]
        print(f"{verb}: {job.title!r}: {reason}", file=sys.stderr)
    codes = [status.exit_code for _, status in missing if status.state in (State.FAILED, State.CANCELLED)]
    return (codes[0] if codes else 0) or (UserError.exit_code if missing else 0)
