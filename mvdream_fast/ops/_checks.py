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


def load_native(op: str, like: torch.Tensor | None = None) -> ModuleType:
    """The extension's functions for the device of `like`, a CPU for None: on CUDA under the same names and signatures.

    Raises: RuntimeError where the extension, or its CUDA part, is not built.
    """
    try:
        from mvdream_fast import _C
    except ImportError as error:
        raise RuntimeError(
            f"{op}: the extension mvdream_fast._C must be built for CPU tensors, got {error}; reinstall mvdream_fast"
        ) from error
    if like is None or not like.is_cuda:
        return _C
    if not hasattr(_C, "cuda"):
        raise RuntimeError(
            f"{op}: tensors must be on a CPU where mvdream_fast was built without CUDA, got {like.device}; "
            "install nvcc and reinstall with CMAKE_ARGS=-DMVDREAM_FAST_CUDA=ON"
        )
    return _C.cuda


def queue_of(like: torch.Tensor) -> object:
    """What native calls take last: on a CPU the number of threads; on CUDA the current stream with torch's settings.

    torch.use_deterministic_algorithms and torch.backends.cuda.matmul.allow_tf32 are the settings that count.
    """
    if not like.is_cuda:
        return torch.get_num_threads()
    from mvdream_fast import _C

    stream = torch.cuda.current_stream(like.device).cuda_stream
    tf32 = torch.backends.cuda.matmul.allow_tf32
    return _C.cuda.Queue(stream, torch.are_deterministic_algorithms_enabled(), tf32)


def aligned(tensor: torch.Tensor) -> torch.Tensor:
    """Contiguous, and on CUDA from a multiple of 16 bytes on, which vector loads need; a copy where it is not."""
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.is_cuda and tensor.data_ptr() % 16 else tensor


def address(tensor: torch.Tensor | None) -> int:
    """Where a contiguous tensor's numbers lie, 0 for None; the caller keeps it alive."""
    return 0 if tensor is None else tensor.data_ptr()
