"""The gated GELU of the UNet's feed-forward layers, value * gelu(gate). The linear layers around it live in models/.

Source: Shazeer 2020, "GLU Variants Improve Transformer", with the exact (erf) GELU of Hendrycks and Gimpel 2016.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mvdream_fast.ops._edges import check_float, is_batched, load_kernels, vmap_error


def geglu(x: Tensor) -> Tensor:
    """value * gelu(gate) of a tensor whose last axis is [value | gate]; the exact GELU, computed in float32.

    Any strides and zero-size inputs are taken; where the leading axes cannot be flattened to one, CUDA makes a copy.
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
    if torch.compiler.is_compiling():
        return torch.ops.mvdream_fast.geglu(x)
    if is_batched(x):
        raise vmap_error("geglu")
    if x.is_cuda:
        return _GEGLU.apply(x)
    return _geglu_cpu(x)


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


def _geglu_cpu(x: Tensor) -> Tensor:
    value, gate = x.chunk(2, dim=-1)
    return (value * F.gelu(gate)).contiguous()


def _backward_cpu(d_y: Tensor, x: Tensor) -> Tensor:
    value, gate = x.to(_wide(x)).chunk(2, dim=-1)
    cdf = 0.5 * (1 + torch.erf(gate / 2**0.5))
    pdf = torch.exp(-0.5 * gate.square()) / (2 * torch.pi) ** 0.5
    d_y = d_y.to(gate.dtype)
    return torch.cat([d_y * gate * cdf, d_y * value * (cdf + gate * pdf)], dim=-1).to(x.dtype).contiguous()


class _GEGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return load_kernels("geglu", "x", x).forward(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_y: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return load_kernels("geglu", "x", x).backward(d_y, x)


@torch.library.custom_op("mvdream_fast::geglu", mutates_args=())
def _op(x: Tensor) -> Tensor:
    return load_kernels("geglu", "x", x).forward(x) if x.is_cuda else _geglu_cpu(x)


@torch.library.custom_op("mvdream_fast::geglu_backward", mutates_args=())
def _op_backward(d_y: Tensor, x: Tensor) -> Tensor:
    return load_kernels("geglu", "x", x).backward(d_y, x) if x.is_cuda else _backward_cpu(d_y, x)


_op.register_fake(lambda x: x.new_empty((*x.shape[:-1], x.shape[-1] // 2)))
_op_backward.register_fake(lambda d_y, x: x.new_empty(x.shape))
_op.register_autograd(
    lambda ctx, d_y: torch.ops.mvdream_fast.geglu_backward(d_y, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)
