"""Plain data becomes typed, frozen dataclasses, and what does not fit is refused by name. A leaf, without torch.

The types and bounds stand on the fields (`Annotated[int, Interval(ge=1)]`, nested dataclasses, too). pydantic compares;
it is imported when the first data comes, so that `--help` does not wait for it.
"""

import dataclasses
import json
from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from annotated_types import Interval

from mvdream_fast.core.errors import UserError

if TYPE_CHECKING:
    from pydantic import TypeAdapter
    from pydantic_core import ErrorDetails

T = TypeVar("T")
Share = Annotated[float, Interval(ge=0, le=1)]
WORDS = {
    "greater than or equal to": "at least",
    "less than or equal to": "at most",
    "a valid integer": "an integer",
    "a valid": "a",
}


class Checked:
    """Base of what `checked` makes: an unknown key, "3" for 3 and a number that is not finite are errors."""

    __pydantic_config__ = {"extra": "forbid", "strict": True, "allow_inf_nan": False}


def checked(cls: type[T], data: Any, source: str, error: type[UserError], names: Mapping[str, str] | None = None) -> T:
    """The dataclass `cls` from plain data, such as JSON or TOML; keys that are left out have their defaults.

    Args: source begins an error's sentence (a file's path; "" begins with the key). names are what the user wrote for a
    key wherever it lies, where that is not its path: {"steps": "--steps"}.
    Raises: `error`, with the key, what it must be and what it is.
    """
    from pydantic import ValidationError

    where = f"{source}: " if source else ""
    try:
        return _adapter(cls).validate_json(json.dumps(data, default=str))
    except ValidationError as found:
        raise error(where + _sentence(cls, data, found.errors(include_url=False), names or {})) from None
    except (ValueError, RecursionError) as found:  # not even JSON: a number of thousands of digits
        raise error(f"{where}{found}") from None


@cache
def _adapter(cls: type[T]) -> "TypeAdapter[T]":
    from pydantic import TypeAdapter

    return TypeAdapter(cls)


def _sentence(cls: type, data: Any, errors: list["ErrorDetails"], names: Mapping[str, str]) -> str:
    """The first error in words: of a union, every alternative; of unknown keys, all of them."""
    first = errors[0]
    place = _place(data, first["loc"])
    if first["type"] == "unexpected_keyword_argument":
        alike = [e["loc"] for e in errors if e["type"] == first["type"] and e["loc"][:-1] == place[:-1]]
        for key in place[:-1]:
            cls = next(f.type for f in dataclasses.fields(cls) if f.name == key)
        known = ", ".join(f.name for f in dataclasses.fields(cls))
        return f"unknown key(s) {', '.join(sorted(str(loc[-1]) for loc in alike))} in {cls.__name__}; known: {known}"
    if first["type"].startswith("missing"):
        return f"{_named(first['loc'], names)} is missing"
    wanted = " or ".join(dict.fromkeys(_requirement(e) for e in errors if _place(data, e["loc"]) == place))
    return (
        f"{_named(place, names) or cls.__name__} must {wanted.replace(' or be ', ' or ')}, got {first['input']!r:.300}"
    )


def _requirement(error: "ErrorDetails") -> str:
    """pydantic's "Input should be greater than or equal to 1" as "be at least 1"."""
    text = error["msg"].partition("should ")[2].partition(" after validation")[0] or f"be right ({error['msg']})"
    for theirs, ours in WORDS.items():
        text = text.replace(theirs, ours)
    return text


def _place(data: Any, loc: tuple[str | int, ...]) -> tuple[str | int, ...]:
    """The keys and indices of an error's place; pydantic also names the alternative of a union, which data lacks."""
    place = []
    for key in loc:
        try:
            data = data[key]
        except (LookupError, TypeError):
            break
        place.append(key)
    return tuple(place)


def _named(place: tuple[str | int, ...], names: Mapping[str, str]) -> str:
    """The place as the user wrote it, else as `unet.channel_mult[1]`; a flag is named whole, without an index."""
    text = ""
    for key in place:
        if isinstance(key, int):
            text += "" if text.startswith("--") else f"[{key}]"
        else:
            text = names[key] if key in names else f"{text}.{key}".removeprefix(".")
    return text
