"""Processes that read and draw files which nobody vouches for: one that dies, hangs or eats memory costs its file.

What they do is dataset.py's; here are only functions, their arguments, and what became of them.
"""

import contextlib
import math
import multiprocessing
import os
import resource
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path
from typing import Any

from mvdream_fast.core.errors import OutOfMemoryError
from mvdream_fast.core.machine import memory_limit, total_memory

LOOK_EVERY = 0.5  # seconds between looks at time, memory and `stop`
READY, TOLD, DONE = "ready", "told", "done"

_say: Callable[[tuple[str, Any]], None] = lambda message: None  # noqa: E731 (what a worker says goes to its parent)


@dataclass(frozen=True)
class Limits:
    """What one process may take: seconds without a word from it, and bytes of main memory."""

    seconds: float
    memory: float


@dataclass(frozen=True)
class Lost:
    """A piece of work that was not done: what it was at (as `tell` said), what went wrong (a word), and the reason."""

    at: str
    kind: str
    reason: str


class Stopped(Exception):
    """Somebody asked for the end."""


def half_the_memory() -> int:
    """Bytes that one worker may take where nobody says otherwise; of a machine that does not tell, 4 GB."""
    return (memory_limit() or total_memory() or 1 << 33) // 2


def tell(at: str) -> None:
    """In a worker: what it is at from now on. Its time begins anew."""
    _say((TOLD, at))


class Workers:
    """`n` processes that have called `begin()`; to be entered, and left with the last of them gone.

    Not forked: neither an OpenGL context nor torch's threads survive one.
    """

    def __init__(self, n: int, begin: Callable[[], None], limits: Limits, stop: Callable[[], object]):
        self.n, self.begin, self.limits, self.stop = max(1, n), begin, limits, stop
        self.all: list[_Worker] = []

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self.all:
            worker.end()

    def map(self, function: Callable[[Any], Any], items: deque) -> Iterator[tuple[Any, Any]]:
        """(item, function(item) or a Lost) in the order of completion, until `items` is empty, to which the caller may
        add. An error that the function raises is raised here.

        Raises: Stopped; OutOfMemoryError where a process dies before it is at anything.
        """
        while items or any(worker.item is not None for worker in self.all):
            while len(self.all) < min(self.n, len(items) + sum(w.item is not None for w in self.all)):
                self.all.append(_Worker(self.begin))
            for worker in self.all:
                if worker.ready and worker.item is None and items:
                    worker.give(function, items.popleft())
            connection.wait([worker.pipe for worker in self.all], LOOK_EVERY)
            if self.stop():
                raise Stopped
            for worker in self.all.copy():
                answer, item = worker.news(self.limits), worker.item
                if answer is None:
                    continue
                if isinstance(answer, Lost):
                    self.all.remove(worker)
                    worker.end()
                    if self.stop():  # a signal to the group ends the workers as well
                        raise Stopped
                    if not answer.at:
                        raise OutOfMemoryError(
                            f"a rendering process ended by itself ({answer.reason}), perhaps for its memory; run again "
                            "with fewer --workers"
                        )
                worker.item = None
                if isinstance(answer, Exception):
                    raise answer
                yield item, answer


class _Worker:
    """One process, and what it was given last."""

    def __init__(self, begin: Callable[[], None]):
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, begin), daemon=True)
        self.process.start()
        theirs.close()
        self.ready, self.item, self.at, self.since = False, None, "", math.inf

    def give(self, function: Callable, item: Any) -> None:
        self.item, self.at, self.since = item, "", time.monotonic()
        with contextlib.suppress(OSError):  # one that is gone: its news say so
            self.pipe.send((function, item))

    def news(self, limits: Limits) -> Any:
        """The answer, an error, a Lost, or None where there is nothing to say yet."""
        try:
            while self.pipe.poll():
                word, content = self.pipe.recv()
                self.since = time.monotonic()
                if word == READY:
                    self.ready, self.since = True, math.inf
                elif word == DONE:
                    self.at, self.since = "", math.inf
                    return content
                else:
                    self.at = content
        except (EOFError, OSError):
            self.process.join()
            return Lost(self.at, "died", _ending(self.process.exitcode or 0))
        if time.monotonic() - self.since > limits.seconds:
            return Lost(self.at, "hung", f"nothing came of it in {limits.seconds:g} seconds")
        if self.item is not None and _resident(self.process.pid) > limits.memory:
            return Lost(self.at, "memory", f"it took more than {limits.memory / 2**30:.1f} GB of memory")
        return None

    def end(self) -> None:
        self.pipe.close()
        self.process.kill()
        self.process.join(timeout=5)


def _resident(pid: int | None) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0


def _ending(code: int) -> str:
    if code >= 0:
        return f"its process left with code {code}"
    return f"its process was ended by {signal.Signals(-code).name}"


def _serve(pipe: connection.Connection, begin: Callable[[], None]) -> None:
    """A worker's whole life."""
    global _say
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # thousands of bad files would leave as many memory images
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")  # where memory runs out, the parent is not who goes
    _say = pipe.send
    try:
        begin()
    except Exception as error:
        _answer(error)
        return
    _say((READY, None))
    while True:
        try:
            function, item = pipe.recv()
        except (EOFError, OSError):
            return
        try:
            answer = function(item)
        except Exception as error:
            answer = error
        _answer(answer)


def _answer(answer: Any) -> None:
    try:
        _say((DONE, answer))
    except Exception as error:  # an error that cannot be pickled
        _say((DONE, RuntimeError(f"{answer!r} ({error})")))


def _leave_with_parent() -> None:
    """A parent that was killed cannot end its processes, and they would wait for work for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)
