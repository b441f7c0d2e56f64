"""Plain data becomes typed, frozen dataclasses, and what does not fit is refused by name. A leaf, without torch.

The types and bounds stand on the fields (`Annotated[int, Interval(ge=1)]`, nested dataclasses, too). pydantic compares;
it is imported when the first data comes, so that `--help` does not wait for it.
"""

import dataclasses
import json
from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, TypeGuard, TypeVar

from annotated_types import Interval

from mvdream_fast.core.errors import UserError

if TYPE_CHECKING:
    from pydantic import TypeAdapter
    from pydantic_core import ErrorDetails

T = TypeVar("T")
Share = Annotated[float, Interval(ge=0, le=1)]


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
    first, of = errors[0], cls
    if first["type"] == "unexpected_keyword_argument":
        *parents, _ = first["loc"]
        unknown = [str(e["loc"][-1]) for e in errors if e["type"] == first["type"] and [*e["loc"][:-1]] == parents]
        for key in parents:
            of = next(f.type for f in dataclasses.fields(of) if f.name == key and isinstance(f.type, type))
        known = ", ".join(f.name for f in dataclasses.fields(of))
        return f"unknown key(s) {', '.join(sorted(unknown))} in {of.__name__}; known: {known}"
    place = _place(first, data, names)
    if first["type"].startswith("missing"):
        return f"{place} is missing"
    wanted = " or ".join(dict.fromkeys(_requirement(e["msg"]) for e in errors if _place(e, data, names) == place))
    return f"{place or cls.__name__} must {wanted.replace(' or be ', ' or ')}, got {first['input']!r:.300}"


def _place(error: "ErrorDetails", data: Any, names: Mapping[str, str]) -> str:
    """The error's key as the user wrote it, else as `unet.channel_mult[1]`; a flag is named whole, without an index."""
    text = ""
    for key in error["loc"]:
        try:
            data = data[key]
        except (LookupError, TypeError):
            if not error["type"].startswith("missing"):
                break  # no key, but pydantic's name for one alternative of a union
        if isinstance(key, int):
            text += "" if text.startswith("--") else f"[{key}]"
        else:
            text = names[key] if key in names else f"{text}.{key}".removeprefix(".")
    return text


def _requirement(message: str) -> str:
    """pydantic's "Input should be greater than or equal to 1" as "be at least 1"."""
    text = message.partition("should ")[2].partition(" after validation")[0] or f"be right ({message})"
    text = text.replace("greater than or equal to", "at least").replace("less than or equal to", "at most")
    text = text.replace("a valid integer", "an integer").replace("a valid array", "an array")
    return text.replace("a valid", "a")


def is_object(value: object) -> TypeGuard[dict[str, Any]]:
    """Whether a JSON value is an object."""
    return isinstance(value, dict)


def is_tuple(value: object) -> TypeGuard[tuple[Any, ...]]:
    """Whether a value is a tuple, for a type checker, too."""
    return isinstance(value, tuple)
