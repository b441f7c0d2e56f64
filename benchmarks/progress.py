"""How far a run of the benchmarks is: a line before each case."""

import time
from collections.abc import Callable


class Progress:
    """A plugin of pytest that says `[3 of 90] bench_geglu.py::bench_geglu[...], about 12 min to go`.

    What is left is told by what the cases so far took.
    """

    def __init__(self, say: Callable[[str], None], n_cases: int, clock: Callable[[], float] = time.monotonic):
        self.say, self.n_cases, self.clock = say, n_cases, clock
        self.n_begun, self.start = 0, clock()

    def pytest_runtest_logstart(self, nodeid: str, location: object) -> None:
        left = ""
        if self.n_begun:
            a_case = (self.clock() - self.start) / self.n_begun
            left = f", {told(a_case * (self.n_cases - self.n_begun))} to go"
        self.n_begun += 1
        self.say(f"[{self.n_begun} of {self.n_cases}] {nodeid.rpartition('/')[2]}{left}")


def told(seconds: float) -> str:
    return f"about {seconds / 60:.0f} min" if seconds >= 90 else f"about {seconds:.0f} s"
