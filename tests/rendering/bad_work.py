"""What can happen in a process that reads a bad file; a module of its own, as processes that are spawned import it."""

import os
import time
from dataclasses import dataclass
from pathlib import Path

from mvdream_fast.rendering.catalogue import Entry
from mvdream_fast.rendering.workers import tell


def begin() -> None:
    pass


def begin_badly() -> None:
    raise ValueError("no renderer")


def die_at_once() -> None:
    os._exit(7)


def happens(word: str) -> None:
    """As the word says."""
    if word == "abort":
        os.abort()
    if word == "leave":
        os._exit(3)
    if word == "sleep":
        time.sleep(600)
    if word == "eat":
        kept = [b"x" * (8 << 20) for _ in range(100)]
        time.sleep(600 + len(kept))
    if word == "raise":
        raise ValueError("of a native library")


def work(word: str) -> str:
    tell(word)
    happens(word)
    return word.upper()


@dataclass(frozen=True)
class BadEntry(Entry):
    """An asset whose reader does something else from its `good` + 1st time on; `log` counts the times."""

    word: str = ""
    good: int = 0
    log: str = ""

    def load(self):
        with open(self.log, "a") as file:
            file.write(f"{self.id}\n")
        if Path(self.log).read_text().split().count(self.id) > self.good:
            happens(self.word)
        return super().load()
