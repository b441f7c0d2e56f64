"""Reads tiny-cuda-nn's JSON objects option by option, with an error that names the key. Keys it doesn't know pass, as
there: other projects keep their own in the same dict.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, SupportsFloat, TypeVar

from mvdream_fast.ops._edges import require

T = TypeVar("T")


class Options:
    """One object of a configuration. `name` is how the caller reaches it: encoding_config, or a part of that."""

    def __init__(self, op: str, name: str, config: Mapping[str, Any]):
        got = type(config).__name__
        require(isinstance(config, Mapping), op, name, "a dict", got, "pass the JSON object", TypeError)
        self.op, self.name, self.config = op, name, config

    def __contains__(self, key: str) -> bool:
        return key in self.config

    def require(self, ok: bool, key: str, requirement: str, remedy: str) -> None:
        """Raises ValueError unless `ok`, with the value that stands under the key."""
        got = repr(self.config[key]) if key in self.config else "nothing"
        require(ok, self.op, f"{self.name}[{key!r}]", requirement, got, remedy)

    def integer(self, key: str, default: int, low: int, high: int) -> int:
        """A whole number in [low, high]; a float that is one passes, as in JSON."""
        value = self.config.get(key, default)
        ok = _is_number(value) and value == int(value) and low <= value <= high
        self.require(ok, key, f"a whole number in [{low}, {high}]", "change it")
        return int(value)

    def number(self, key: str, default: float) -> float:
        """A finite number."""
        value = self.config.get(key, default)
        self.require(_is_number(value), key, "a finite number", "change it")
        return float(value)

    def choice(self, key: str, default: str, table: Mapping[str, T]) -> T:
        """The table's entry under a name, whose letters may be small or capital."""
        value = self.config.get(key, default)
        found = [entry for name, entry in table.items() if isinstance(value, str) and name.lower() == value.lower()]
        self.require(bool(found), key, f"one of {', '.join(table)}", "correct the name")
        return found[0]

    def nested(self, key: str) -> Iterator["Options"]:
        """The objects of a list that has at least one."""
        value = self.config.get(key)
        parts = [*value] if isinstance(value, Sequence) and not isinstance(value, str) else []
        self.require(bool(parts), key, "a list of at least one encoding", "add them")
        for i, part in enumerate(parts):
            yield Options(self.op, f"{self.name}[{key!r}][{i}]", part)


def _is_number(value: object) -> bool:
    """Python's, NumPy's and torch's numbers, neither true, infinite nor NaN."""
    return isinstance(value, SupportsFloat) and not isinstance(value, bool) and math.isfinite(float(value))
