"""What files were when they were read: enough to know whether what was learned from them still holds."""

import hashlib
import os
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

Stamp = tuple[int, int, str] | None  # size, time of change in ns, SHA-256; None for a file that was not there


def place(path: Path) -> Path:
    """Where a file lies: links to folders are followed. Not a link in the file's own place (the hub's cache, DVC and
    git-annex put one there): what belongs to the file lies beside it."""
    return path.parent.resolve() / path.name


def stamps(paths: Iterable[str]) -> dict[str, Stamp]:
    """The stamp of each file."""
    return {path: _stamp(path) for path in paths}


def unchanged(stored: dict[str, Stamp]) -> dict[str, Stamp] | None:
    """The same stamps, with today's times, where all contents are the same; else None.

    A file of the same size and time is not read again.
    """
    now = {}
    for path, before in stored.items():
        found = _size_and_time(path)
        if found is None or before is None:
            after = None
        else:
            after = before if tuple(before[:2]) == found else _stamp(path)
        if (after and after[2]) != (before and before[2]) or (before is None and found is not None):
            return None
        now[path] = after
    return now


def _size_and_time(path: str) -> tuple[int, int] | None:
    try:
        state = os.stat(path)
    except OSError:
        return None
    return state.st_size, state.st_mtime_ns


def _stamp(path: str) -> Stamp:
    found = _size_and_time(path)
    return None if found is None else (*found, _digest(path, *found))


@lru_cache(maxsize=64)
def _digest(path: str, size: int, time: int) -> str:
    """A library of a thousand assets is read once."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
