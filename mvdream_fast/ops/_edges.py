"""What the public edges of the ops share: autocast, vmap and device checks. No maths here."""

import torch
from torch import Tensor
from torch.autograd import forward_ad

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def by_name(x: Tensor) -> bool:
    """Whether a call goes through the registered op: torch.compile is tracing, or x is on the meta device, where only
    shapes are asked for."""
    return torch.compiler.is_compiling() or x.is_meta


def is_autocast(x: Tensor) -> bool:
    """Whether autocast is on for x's device; torch refuses to answer for the meta device."""
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)


def is_batched(*tensors: Tensor | None) -> bool:
    """Whether any tensor is being vmapped over (torch.func.vmap); cheap when no transform is active."""
    if not torch._C._are_functorch_transforms_active():
        return False
    return any(x is not None and torch._C._functorch.is_batchedtensor(x) for x in tensors)


def runs_natively(*tensors: Tensor | None) -> bool:
    """Whether the CPU extension may read and replace these: plain float32 tensors that no transform is watching."""
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return False
    return all(x is None or (_is_plain(x) and x.dtype == torch.float32 and not x.is_neg()) for x in tensors)


def _is_plain(x: Tensor) -> bool:
    return type(x) in (Tensor, torch.nn.Parameter) and x.device.type == "cpu" and x.layout is torch.strided


def is_recorded(*tensors: Tensor | None) -> bool:
    """Whether autograd wants a node for a call on these."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def vmap_error(op: str) -> RuntimeError:
    return RuntimeError(f"{op}: arguments must be plain tensors, got a vmapped one; put the extra axis into the batch")


def check_float(op: str, name: str, x: Tensor) -> None:
    if x.dtype not in FLOATS:
        raise TypeError(f"{op}: {name} must be float32, float16, bfloat16 or float64, got {x.dtype}; convert it first")


def check_like(op: str, name: str, x: Tensor, other: str, like: Tensor) -> None:
    """`x` must sit on the device of `like` and have its dtype or float32 (parameters kept in full precision)."""
    if x.device != like.device:
        raise RuntimeError(f"{op}: {name} must be on the device of {other}, got {x.device} and {like.device}; move one")
    if x.dtype != like.dtype and x.dtype != torch.float32:
        raise TypeError(f"{op}: {name} must be {like.dtype} (as {other}) or float32, got {x.dtype}; convert it first")


def load_kernels(op: str, name: str, x: Tensor):
    """The module `mvdream_fast.kernels.<op>`, for a CUDA tensor `x`; says what to install where Triton is missing."""
    if x.dtype == torch.float64:
        raise TypeError(f"{op}: {name} must be float32, float16 or bfloat16 on CUDA, got {x.dtype}; convert it first")
    from importlib import import_module

    try:
        return import_module(f"mvdream_fast.kernels.{op}")
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        raise RuntimeError(
            f"{op}: {name} must be a CPU tensor where Triton is not installed, got one on {x.device}; "
            "install mvdream_fast[gpu]"
        ) from error
