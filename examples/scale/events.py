"""A small discrete-event simulator: a clock, processes that wait, a server with a queue, a link that is shared.

A process is a generator that yields waits. A wait is a function: told whom to call when it is over, it answers how it
is given up. Nothing of what is simulated is known here.
"""

import heapq
import itertools
from collections.abc import Callable, Generator
from functools import partial
from math import inf

Call = Callable[[], None]
Wait = Callable[[Call], Call]
Steps = Generator[Wait, None, None]


def both(first: Wait, second: Wait) -> Wait:
    """A wait for two things at once, until the later is over."""

    def wait(resume: Call) -> Call:
        left = 2

        def one_is_over() -> None:
            nonlocal left
            left -= 1
            if not left:
                resume()

        give_up = [first(one_is_over), second(one_is_over)]

        def give_up_both() -> None:
            for call in give_up:
                call()

        return give_up_both

    return wait


class Clock:
    """The time, in seconds, and what happens when."""

    def __init__(self) -> None:
        self.now = 0.0
        self._order = itertools.count()  # of events at the same time: as they were asked for
        self._events: list[list] = []
        self._is_over = False

    def at(self, time: float, call: Call) -> Call:
        """Calls at that time. Returns how it is called off."""
        return partial(self.put(time, call).__setitem__, 2, None)

    def put(self, time: float, call: Call) -> list:
        """As `at`, for who has millions of calls; it is called off where the last of what is returned becomes None."""
        event = [time, next(self._order), call]
        heapq.heappush(self._events, event)
        return event

    def sleep(self, seconds: float) -> Wait:
        """A wait for so long."""
        return lambda resume: self.at(self.now + seconds, resume)

    def stop(self) -> None:
        """Nothing more happens."""
        self._is_over = True

    def run(self) -> None:
        """Until it is stopped, or nothing is left to happen."""
        events, pop = self._events, heapq.heappop
        while events and not self._is_over:
            self.now, _, call = pop(events)
            if call is not None:
                call()


class Process:
    """A generator under way, which begins at once."""

    def __init__(self, steps: Steps):
        self._steps = steps
        self._give_up: Call | None = None
        self._resume()

    def stop(self) -> None:
        """Ends it where it waits; the generator sees GeneratorExit."""
        if self._give_up is not None:
            self._give_up()
        self._steps.close()

    def _resume(self) -> None:
        self._give_up = None
        try:
            wait = next(self._steps)
        except StopIteration:
            return
        self._give_up = wait(self._resume)


class Server:
    """Answers one operation after the other, in the order in which they come.

    rate: operations a second. latency: seconds that one operation takes at least, one after the other, for who asks.
    """

    def __init__(self, clock: Clock, rate: float, latency: float = 0.0):
        self._clock, self._rate, self._latency, self._free_at = clock, rate, latency, 0.0

    def serve(self, operations: float) -> Wait:
        """A wait for so many operations, which follow each other."""
        return lambda resume: self._clock.at(self.over(operations), resume)

    def over(self, operations: float) -> float:
        """Asks for so many operations now. Returns when the last of them will be over."""
        now = self._clock.now
        free_at = (self._free_at if self._free_at > now else now) + operations / self._rate
        self._free_at, alone = free_at, now + operations * self._latency
        return free_at if free_at > alone else alone


class Link:
    """A bandwidth that all transfers under way share evenly, each of them at most `each` bytes a second.

    All have the same rate, so what one has received is a difference of one sum, `_received`: that of a transfer which
    had been there from the beginning. The next to end is the one that ends at the least of it.
    """

    def __init__(self, clock: Clock, total: float, each: float = inf):
        self._clock, self._total, self._each = clock, total, each
        self._flows: list[list] = []  # [what was received by its end, order, resume or None where it was given up]
        self._order = itertools.count()
        self._n, self._received, self._last = 0, 0.0, 0.0
        self._call_off: Call | None = None

    def move(self, n_bytes: float) -> Wait:
        """A wait until so many bytes are over."""

        def wait(resume: Call) -> Call:
            self._advance()
            flow = [self._received + n_bytes, next(self._order), resume]
            heapq.heappush(self._flows, flow)
            self._n += 1
            self._plan()
            return lambda: self._drop(flow)

        return wait

    def _rate(self) -> float:
        return min(self._each, self._total / self._n)

    def _advance(self) -> None:
        if self._n:
            self._received += self._rate() * (self._clock.now - self._last)
        self._last = self._clock.now

    def _drop(self, flow: list) -> None:
        if flow[2] is None:
            return  # it is over
        self._advance()
        flow[2] = None
        self._n -= 1
        self._plan()

    def _plan(self) -> None:
        """Asks to be called when the next transfer ends."""
        if self._call_off is not None:
            self._call_off()
            self._call_off = None
        while self._flows and self._flows[0][2] is None:
            heapq.heappop(self._flows)
        if self._flows:
            left = max(self._flows[0][0] - self._received, 0.0)
            self._call_off = self._clock.at(self._clock.now + left / self._rate(), self._end)

    def _end(self) -> None:
        self._call_off = None
        self._received, self._last = self._flows[0][0], self._clock.now
        ended = []
        while self._flows and self._flows[0][0] <= self._received:
            flow = heapq.heappop(self._flows)
            if flow[2] is not None:
                ended.append(flow[2])
                flow[2] = None
        self._n -= len(ended)
        self._plan()
        for resume in ended:
            resume()
