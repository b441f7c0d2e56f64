"""What the packed-sample ops share: argument checks in the house's one sentence, and the way into the extension."""

from collections.abc import Sequence
from types import ModuleType

import torch


def require(ok: bool, op: str, argument: str, requirement: str, got: object, remedy: str, error=ValueError) -> None:
    """Raise `error` as `<op>: <argument> must be <requirement>, got <value>; <what to do>` unless `ok`."""
    if not ok:
        raise error(f"{op}: {argument} must be {requirement}, got {got}; {remedy}")


def check_float(op: str, argument: str, value: object, shape: Sequence[int | None]) -> None:
    """A float32 or float64 tensor of this shape; None stands for any length."""
    require(isinstance(value, torch.Tensor), op, argument, "a tensor", type(value).__name__, "pass a tensor", TypeError)
    wanted = "[" + ", ".join("any" if n is None else str(n) for n in shape) + "]"
    fits = value.ndim == len(shape) and all(n is None or n == m for n, m in zip(shape, value.shape, strict=True))
    require(fits, op, argument, f"of shape {wanted}", list(value.shape), "reshape it")
    known = value.dtype in (torch.float32, torch.float64)
    require(known, op, argument, "float32 or float64", value.dtype, "convert it with .float()", TypeError)


def check_same_device(op: str, **tensors: torch.Tensor | None) -> None:
    """Every tensor on the device of the first."""
    first, *rest = [(name, t) for name, t in tensors.items() if t is not None]
    for name, tensor in rest:
        same = tensor.device == first[1].device
        remedy = f"move it with .to({first[0]}.device)"
        require(same, op, name, f"on {first[1].device} like {first[0]}", tensor.device, remedy, RuntimeError)


def load_native(op: str) -> ModuleType:
    """The extension `mvdream_fast._C`, for CPU tensors."""
    try:
        from mvdream_fast import _C
    except ImportError as error:
        raise RuntimeError(
            f"{op}: the extension mvdream_fast._C must be built for CPU tensors, got {error}; reinstall mvdream_fast"
        ) from error
    return _C


def address(tensor: torch.Tensor | None) -> int:
    """Where a contiguous tensor's numbers lie, 0 for None; the caller keeps it alive."""
    return 0 if tensor is None else tensor.data_ptr()
