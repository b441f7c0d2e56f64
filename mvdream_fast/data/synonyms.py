"""Other names of everyday things, from the table in synonyms.txt; how captions are worded is captions.py's."""

import re
from functools import cache
from importlib.resources import files

from mvdream_fast.core.files import read_lines

MOST = 4  # other names of one thing
# What may stand before a name without making it another thing, and before a colour: "a small round blue table".
NUMBERS = frozenset("two three four five six seven eight nine ten several many".split())  # noqa: SIM905
PLAIN = frozenset(
    "small large big little tiny huge giant tall short long wide narrow thick thin open closed old round square oval "  # noqa: SIM905
    "rectangular pointed curved".split()
)
_STUFF = {"wooden", "metal", "stone", "plastic", "leather", "glass", "simple"}
_ADDITION = re.compile(r" (?:with|on|of|and|under|for|holding|lying|in) ")


def synonyms(name: str) -> list[str]:
    """Other true names: "leather sofa with cushions" -> "leather couch with cushions", ...; at most MOST.

    The longest end of the name before any addition that has other names gives them: a "coffee table" is what the table
    says of that, not what it says of a table. Kinds are for a name without other words than PLAIN ones before it.
    """
    addition = _ADDITION.search(name)
    head, rest = (name[: addition.start()], name[addition.start() :]) if addition else (name, "")
    words, (same, kinds) = head.split(), table()
    if not words or words[0] in NUMBERS:
        return []
    for k in range(len(words)):
        end = " ".join(words[k:])
        others = list(same.get(end, ()))
        if set(words[:k]) <= PLAIN | _STUFF:
            others += kinds.get(end, ())
        if others:
            before = words[k - 1] + " " if k else ""  # a wooden crate is no "wooden wooden box"
            found = (" ".join([*words[:k], other.removeprefix(before)]) + rest for other in others)
            return list(dict.fromkeys(found))[:MOST]
    return []


@cache
def table() -> tuple[dict[str, tuple[str, ...]], dict[str, tuple[str, ...]]]:
    """(name -> names of the same thing, name -> kinds that it is of), from lines `a = b = c` and `a > b, c`."""
    same: dict[str, tuple[str, ...]] = {}
    kinds: dict[str, tuple[str, ...]] = {}
    for line in read_lines(files("mvdream_fast.data") / "synonyms.txt"):
        if not line or line.startswith("#"):
            continue
        if "=" in line:
            names = [name.strip() for name in line.split("=")]
            for name in names:
                same[name] = tuple(dict.fromkeys((*same.get(name, ()), *(n for n in names if n != name))))
        else:
            name, _, rest = (part.strip() for part in line.partition(">"))
            kinds[name] = tuple(dict.fromkeys((*kinds.get(name, ()), *(n.strip() for n in rest.split(",")))))
    return same, kinds
