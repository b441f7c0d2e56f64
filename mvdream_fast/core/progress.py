"""Now and then: what is due once so many seconds have passed, and the line that says how far a loop has come."""

import time


class Every:
    """Due once `seconds` have passed since it was made or begun again; never for 0."""

    def __init__(self, seconds: float):
        self.seconds = seconds
        self.begin()

    def begin(self) -> None:
        """Counts from now."""
        self.since = time.monotonic()

    def due(self) -> bool:
        """Whether the time is up; it counts on until `begin`."""
        return 0 < self.seconds < time.monotonic() - self.since


class Pace:
    """How far a loop has come, how fast it is and how long it will be, every so many seconds."""

    def __init__(self, seconds: float):
        self.every, self.start, self.n_calls = Every(seconds), time.monotonic(), 0

    def __call__(self, done: int, total: int) -> str:
        """To be called after every step, of which `done` are done, earlier runs' too; empty while no line is due.

        The last step's line always is.
        """
        self.n_calls += 1
        if done < total and not self.every.due():
            return ""
        self.every.begin()
        pace = (self.every.since - self.start) / self.n_calls
        left = pace * (total - done)
        left = f"{left:.0f} s" if left < 100 else f"{left / 60:.1f} min"
        return f"step {done}/{total}, {pace:.2f} s/step, {left} left"
