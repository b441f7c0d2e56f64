"""value * gelu(gate) of [value | gate] rows in Triton, forward and backward; float32 inside.

Formula: y = a g Phi(g), Phi(g) = (1 + erf(g / sqrt 2)) / 2, phi(g) = exp(-g^2 / 2) / sqrt(2 pi)
    d_a = d_y g Phi(g), d_g = d_y a (Phi(g) + g phi(g))
Source: Shazeer 2020, "GLU Variants Improve Transformer"; Hendrycks and Gimpel 2016, "Gaussian Error Linear Units".
"""

import math

import torch
import triton
import triton.language as tl
from mvdream_fast.kernels._launch import Launch, by_layout
from torch import Tensor

OPTIONS = {"enable_fp_fusion": True, "num_warps": 4}
BLOCK = 1024
INV_SQRT_2 = tl.constexpr(0.7071067811865476)
INV_SQRT_2PI = tl.constexpr(0.3989422804014327)


@triton.jit
def _place(rows, width, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """int64 rows [BLOCK_R, 1] and columns [1, BLOCK_C] of this program, and which of them are inside."""
    n_blocks = tl.cdiv(width, BLOCK_C)
    row = (tl.program_id(0) // n_blocks).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    col = (tl.program_id(0) % n_blocks).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    return row, col, (row < rows) & (col < width)


@triton.jit
def geglu_forward(
    x, y, x_row_stride, x_col_stride, rows, width, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """y [rows, width] contiguous from x [rows, 2 width]."""
    row, col, inside = _place(rows, width, BLOCK_R, BLOCK_C)
    at = x + row * x_row_stride + col * x_col_stride
    value = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(at + tl.cast(width, tl.int64) * x_col_stride, mask=inside, other=0.0).to(tl.float32)
    gelu = 0.5 * gate * (1 + tl.erf(gate * INV_SQRT_2))
    tl.store(y + row * width + col, (value * gelu).to(y.dtype.element_ty), mask=inside)


@triton.jit
def geglu_backward(
    d_y, x, d_x, d_y_row_stride, d_y_col_stride, x_row_stride, x_col_stride, rows, width,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """d_x [rows, 2 width] contiguous."""
    row, col, inside = _place(rows, width, BLOCK_R, BLOCK_C)
    at = x + row * x_row_stride + col * x_col_stride
    value = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(at + tl.cast(width, tl.int64) * x_col_stride, mask=inside, other=0.0).to(tl.float32)
    cotangent = tl.load(d_y + row * d_y_row_stride + col * d_y_col_stride, mask=inside, other=0.0).to(tl.float32)
    cdf = 0.5 * (1 + tl.erf(gate * INV_SQRT_2))
    pdf = INV_SQRT_2PI * tl.exp(-0.5 * gate * gate)
    d_value = cotangent * gate * cdf
    d_gate = cotangent * value * (cdf + gate * pdf)
    out = d_x + row * (2 * width) + col
    tl.store(out, d_value.to(d_x.dtype.element_ty), mask=inside)
    tl.store(out + width, d_gate.to(d_x.dtype.element_ty), mask=inside)


def forward(x: Tensor) -> Tensor:
    """[..., 2C] -> [..., C] contiguous; leading axes that do not flatten are copied."""
    rows, strides = _rows(x)
    launch, shape = _forward_launch(x.shape, strides, x.dtype, x.device)
    y = torch.empty(shape, dtype=x.dtype, device=x.device)
    if launch:
        launch(rows, y)
    return y


def backward(d_y: Tensor, x: Tensor) -> Tensor:
    """d_x [..., 2C] contiguous."""
    (rows, strides), (d_rows, d_strides) = _rows(x), _rows(d_y)
    launch = _backward_launch(x.shape, strides, d_strides, x.dtype, x.device)
    d_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if launch:
        launch(d_rows, rows, d_x)
    return d_x


def _rows(x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """Rows of the last axis, one after another, and their strides, () where they are contiguous."""
    if x.is_contiguous():
        return x, ()
    rows = x.reshape(-1, x.shape[-1]) if x.numel() else x
    return rows, rows.stride()


@by_layout
def _forward_launch(
    shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> tuple[Launch | None, tuple[int, ...]]:  # fmt: skip
    """The kernel, None where there is nothing to do, and the result's shape."""
    *leading, columns = shape
    rows, width = math.prod(leading), columns // 2
    if not rows * width:
        return None, (*leading, width)
    programs, tile = _tile(rows, width)
    values = (*(strides or (columns, 1)), rows, width)
    return Launch(geglu_forward, programs, values, tile), (*leading, width)


@by_layout
def _backward_launch(
    shape: tuple[int, ...], strides: tuple[int, ...], d_strides: tuple[int, ...], dtype: torch.dtype,
    device: torch.device,
) -> Launch | None:  # fmt: skip
    *leading, columns = shape
    rows, width = math.prod(leading), columns // 2
    if not rows * width:
        return None
    programs, tile = _tile(rows, width)
    values = (*(d_strides or (width, 1)), *(strides or (columns, 1)), rows, width)
    return Launch(geglu_backward, programs, values, tile)


def _tile(rows: int, width: int) -> tuple[int, dict[str, object]]:
    block_c = min(BLOCK, triton.next_power_of_2(width))
    block_r = BLOCK // block_c
    programs = triton.cdiv(rows, block_r) * triton.cdiv(width, block_c)
    return programs, {"BLOCK_R": block_r, "BLOCK_C": block_c, **OPTIONS}
