"""The gated GELU of the UNet's feed-forward layers, value * gelu(gate). The linear layers around it live in models/.

Source: Shazeer 2020, "GLU Variants Improve Transformer", with the exact (erf) GELU of Hendrycks and Gimpel 2016.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from mvdream_fast.ops._edges import (
    address,
    by_name,
    check_float,
    is_batched,
    is_followed,
    is_recorded,
    load_native,
    run_kernels,
    runs_natively,
    thread_count,
    vmap_error,
)
from mvdream_fast.ops._registered import differentiable, register


def geglu(x: Tensor) -> Tensor:
    """value * gelu(gate) of a tensor whose last axis is [value | gate]; the exact GELU, computed in float32.

    Any strides and zero-size inputs are taken; where the leading axes cannot be flattened to one, CUDA makes a copy.
    Contiguous float32 on a CPU runs natively, bit-identical for any number of threads; the rest there is plain torch.
    Autocast does not change the dtype: it is the input's.

    Args:
        x: [..., 2C], float32, float16 or bfloat16 (float64 on the CPU).

    Returns:
        [..., C], contiguous.

    Raises:
        ValueError: the last axis is missing or odd.
        TypeError: x is not of a floating dtype.
        RuntimeError: under vmap, or a CUDA tensor without Triton.

    Source: Shazeer 2020, equation 6.
    """
    _check(x)
    if by_name(x):
        return torch.ops.mvdream_fast.geglu(x)
    if is_batched(x):
        raise vmap_error("geglu")
    if x.is_cuda:
        return _GEGLU.apply(x) if is_followed(x) else _forward_kernels(x)
    if not _is_native(x):
        return _cpu(x)
    return _OnCpu.apply(x) if is_recorded(x) else _forward_native(x)


def geglu_ref(x: Tensor) -> Tensor:
    """geglu in plain torch, at least in float32; any device, differentiable."""
    value, gate = x.to(_wide(x)).chunk(2, dim=-1)
    gelu = 0.5 * gate * (1 + torch.erf(gate / 2**0.5))
    return (value * gelu).to(x.dtype)


def _check(x: Tensor) -> None:
    check_float("geglu", "x", x)
    if x.ndim == 0 or x.shape[-1] % 2:
        raise ValueError(f"geglu: x must be [..., 2C], got {tuple(x.shape)}; its last axis holds value, then gate")


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _is_native(x: Tensor) -> bool:
    return runs_natively(x) and x.is_contiguous() and x.numel() > 0


def _cpu(x: Tensor) -> Tensor:
    """Under torch's own autograd."""
    value, gate = x.to(_wide(x)).chunk(2, dim=-1)
    return (value * F.gelu(gate)).to(x.dtype).contiguous()


def _forward_native(x: Tensor) -> Tensor:
    n_columns = x.shape[-1] // 2
    y = x.new_empty((*x.shape[:-1], n_columns))
    sizes = (x.numel() // (2 * n_columns), n_columns)
    load_native("geglu").geglu_forward(address(x), *sizes, address(y), thread_count())
    return y


def _backward_cpu(cotangents, kept, wanted, x: Tensor) -> list[Tensor]:
    (d_y,) = cotangents
    if _is_native(x) and runs_natively(d_y):
        n_columns, d_x, d_y = x.shape[-1] // 2, torch.empty_like(x), d_y.contiguous()
        sizes = (x.numel() // (2 * n_columns), n_columns)
        load_native("geglu").geglu_backward(address(d_y), address(x), *sizes, address(d_x), thread_count())
        return [d_x]
    value, gate = x.to(_wide(x)).chunk(2, dim=-1)
    cdf = 0.5 * (1 + torch.erf(gate / 2**0.5))
    pdf = torch.exp(-0.5 * gate.square()) / (2 * torch.pi) ** 0.5
    d_y = d_y.to(gate.dtype)
    return [torch.cat([d_y * gate * cdf, d_y * value * (cdf + gate * pdf)], dim=-1).to(x.dtype).contiguous()]


def _forward_kernels(x: Tensor) -> Tensor:
    return run_kernels("geglu", "x", x, "forward", x)


def _backward_kernels(cotangents, kept, wanted, x: Tensor) -> list[Tensor]:
    return [run_kernels("geglu", "x", x, "backward", *cotangents, x)]


_GEGLU = differentiable(_forward_kernels, _backward_kernels)
_OnCpu = differentiable(_forward_native, _backward_cpu, twice=geglu_ref)
register(
    "geglu(Tensor x) -> Tensor",
    cpu=differentiable(lambda x: _forward_native(x) if _is_native(x) else _cpu(x), _backward_cpu),
    cuda=_GEGLU,
    fake=lambda x: x.new_empty((*x.shape[:-1], x.shape[-1] // 2)),
)
