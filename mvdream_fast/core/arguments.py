"""What a public Python call is given, as the types that it works with: the numbers, texts, arrays and paths of NumPy,
torch and Python are all taken; anything else is one sentence (ArgumentError). Imports torch only for a tensor.
"""

import math
import operator
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mvdream_fast.core.errors import ArgumentError

if TYPE_CHECKING:
    from torch import Tensor


def whole(op: str, name: str, value: Any, remedy: str, least: int = 1, most: int | None = None) -> int:
    """A whole number of any library; not 4.0, "4" or True."""
    number = None if _is_bool(value) else _or_none(operator.index, value)
    if number is None:
        raise ArgumentError(f"{op}: {name} must be a whole number, got {_shown(value)}; {remedy}")
    if number < least or (most is not None and number > most):
        wanted = f"at least {least}" if most is None else f"from {least} to {most}"
        raise ArgumentError(f"{op}: {name} must be {wanted}, got {number}; {remedy}")
    return number


def finite(op: str, name: str, value: Any, remedy: str, low: float = -math.inf, high: float = math.inf) -> float:
    """A finite number of any library, from `low` to `high`; not "4" or True."""
    number = None if _is_bool(value) or isinstance(value, (str, bytes)) else _or_none(float, value)
    if number is None:
        raise ArgumentError(f"{op}: {name} must be a number, got {_shown(value)}; {remedy}")
    if not (math.isfinite(number) and low <= number <= high):
        wanted = "finite" if low == -math.inf else f"from {low:g} to {high:g}"
        raise ArgumentError(f"{op}: {name} must be {wanted}, got {number:g}; {remedy}")
    return number


def texts(op: str, name: str, value: Any, remedy: str) -> list[str]:
    """One text or any sequence of them, as a list."""
    if isinstance(value, str):
        return [value]
    found = None if isinstance(value, (bytes, dict)) else _or_none(list, value)
    if found is None or not all(isinstance(text, str) for text in found):
        raise ArgumentError(f"{op}: {name} must be text or a list of texts, got {_shown(value)}; {remedy}")
    return found


def array(op: str, name: str, value: Any, wanted: str) -> "Tensor":
    """A tensor of real numbers from a tensor, a NumPy array or nested lists of numbers (or of those)."""
    import numpy as np
    import torch

    if isinstance(value, (list, tuple)) and any(isinstance(item, torch.Tensor) for item in value):
        value = _or_none(torch.stack, value)
    if not isinstance(value, torch.Tensor):
        found = _or_none(np.asarray, value)
        if found is None or found.dtype.kind not in "fiu":
            raise ArgumentError(f"{op}: {name} must be {wanted}, got {_shown(value)}; pass a tensor or a NumPy array")
        value = torch.tensor(found)  # a copy: the caller's array may be read-only, or change
    if value.dtype == torch.bool or value.is_complex():
        raise ArgumentError(f"{op}: {name} must be {wanted}, got {value.dtype}; convert it first")
    return value if value.is_floating_point() else value.float()


def user_path(path: str | os.PathLike[str]) -> Path:
    """The path with a `~` at its beginning as the home folder, as a shell would read it."""
    if not (is_a(path, str) or is_a(path, os.PathLike)):
        raise ArgumentError(f"a path must be text or a pathlib.Path, got {_shown(path)}; name a file or a folder")
    return Path(os.path.expanduser(path))


def is_a(value: object, kind: type) -> bool:
    """isinstance, for what is annotated as `kind`: who calls a library may not have its types checked."""
    return isinstance(value, kind)


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool) or str(getattr(value, "dtype", "")) in ("bool", "torch.bool")


def _or_none(convert: Any, value: Any) -> Any:
    try:
        return convert(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return None


def _shown(value: Any) -> str:
    """A value in a sentence: short ones as they are, others by their type."""
    text = repr(value)
    return text if len(text) <= 40 and "\n" not in text else type(value).__name__
