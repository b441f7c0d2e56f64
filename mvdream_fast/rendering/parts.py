"""One rendering shared among many machines: `--shard i/n` takes every n-th asset, in a folder of its own.

A part needs nothing of the others, so that they may run at any time, anywhere; all of them side by side are the data
set (`data.shards` looks for shards in the folders of parts, too).
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from mvdream_fast.core.errors import ArgumentError, OutputError

Item = TypeVar("Item")
FOLDER = re.compile(r"shard-(\d+)-of-(\d+)")


@dataclass(frozen=True)
class Part:
    """Number `i` of `n`, from 1."""

    i: int
    n: int

    @classmethod
    def read(cls, text: str) -> "Part":
        """From "i/n". Raises ArgumentError."""
        found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
        part = cls(*map(int, found.groups())) if found else None
        if part is None or not 1 <= part.i <= part.n:
            raise ArgumentError(f"--shard must be i/n with i from 1 to n, as 3/100, got {text}")
        return part

    def of(self, items: list[Item]) -> list[Item]:
        """This part of a list: every n-th item, from the i-th on."""
        return items[self.i - 1 :: self.n]

    def folder(self, out: Path) -> Path:
        """Where this part's files lie."""
        return out / f"shard-{self.i:05d}-of-{self.n:05d}"

    def check(self, out: Path, options: dict[str, Any], settings: str) -> None:
        """Raises OutputError where `out` holds a whole data set, or parts of another number or with other options, as
        the file `settings` in each folder says."""
        if (out / settings).exists() or any(out.glob("*.tar")):
            raise OutputError(f"{out} holds a data set that was made without --shard; name another folder with -o")
        others = [path for path in sorted(out.glob("shard-*")) if FOLDER.fullmatch(path.name)]
        for other in others:
            if not other.name.endswith(f"-of-{self.n:05d}"):
                raise OutputError(f"{out} holds {other.name}, a part of another number; name another folder with -o")
        for other in others[:1]:
            try:
                found = json.loads((other / settings).read_bytes())
            except (OSError, ValueError):
                continue  # just begun
            if different := sorted(k for k, value in options.items() if found.get(k) != value):
                raise OutputError(f"{other} was begun with another {', '.join(different)}; name another folder with -o")
