"""How far a run of the benchmarks is: a line before each case."""

import time
from collections.abc import Callable


class Progress:
    """A plugin of pytest that says `[3 of 90] bench_geglu.py::bench_geglu[...], about 12 min to go`.

    n_before: how many of the cases another process has begun. What is left is told by what this one's took so far.
    """

    def __init__(
        self, say: Callable[[str], None], n_cases: int, n_before: int = 0, clock: Callable[[], float] = time.monotonic
    ):
        self.say, self.n_cases, self.n_before, self.clock = say, n_cases, n_before, clock
        self.n_begun, self.start = n_before, clock()

    def pytest_runtest_logstart(self, nodeid: str, location: object) -> None:
        left = ""
        if self.n_begun > self.n_before:
            a_case = (self.clock() - self.start) / (self.n_begun - self.n_before)
            left = f", {told(a_case * (self.n_cases - self.n_begun))} to go"
        self.n_begun += 1
        self.say(f"[{self.n_begun} of {self.n_cases}] {nodeid.rpartition('/')[2]}{left}")


def told(seconds: float) -> str:
    return f"about {seconds / 60:.0f} min" if seconds >= 90 else f"about {seconds:.0f} s"
